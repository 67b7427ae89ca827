"""Reading documents, on files written here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from qaware.errors import QawareError
from qaware.lm import documents

from .stories import ODD, SEPARATOR, STORIES


def rows(path: Path, values: list[Any], field: str = "text") -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({field: value, "id": 1}) + "\n" for value in values))
    else:
        datasets.Dataset.from_dict({field: values, "id": [1] * len(values)}).to_parquet(str(path))
    return str(path)


def txt(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_python_docs_are_one_document_a_topic() -> None:
    topics = documents.read_documents(documents.PYTHON_DOCS)
    assert len(topics) > 50
    assert topics[0].startswith('The "assert" statement')
    assert documents.read_documents(documents.PYTHON_DOCS, limit=3) == topics[:3]


def test_txt_is_one_document_or_split(tmp_path: Path) -> None:
    name = txt(tmp_path / "a.txt", f" {ODD} <|end|>\n\n<|end|>two\n")
    assert documents.read_documents(name) == [f"{ODD} <|end|>\n\n<|end|>two"]
    assert documents.read_documents(name, separator="<|end|>") == [ODD, "two"]
    assert documents.read_documents(name, separator="<|end|>", limit=1) == [ODD]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_rows_are_documents(tmp_path: Path, ending: str, capfd: pytest.CaptureFixture[str]) -> None:
    name = rows(tmp_path / f"a{ending}", [ODD, "", None, " two "], "body")
    capfd.readouterr()
    assert documents.read_documents(name, text_field="body") == [ODD, "two"]
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    with pytest.raises(QawareError, match=r"'text' is not in .*, which has body, id; name one"):
        documents.read_documents(name)
    with pytest.raises(QawareError, match="is int, not text; choose of body, id"):
        documents.read_documents(name, text_field="id")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    name = rows(tmp_path / "a.jsonl", ["one"])
    when = os.stat(name)
    assert documents.read_documents(name) == ["one"]
    rows(tmp_path / "a.jsonl", ["two"])
    os.utime(name, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert documents.read_documents(name) == ["two"]


def test_files_keep_their_order_and_globs_are_sorted(tmp_path: Path) -> None:
    a, b = txt(tmp_path / "a.txt", "A"), txt(tmp_path / "b.txt", "B")
    c = rows(tmp_path / "c.jsonl", ["C"])
    assert documents.read_documents([c, b, a]) == ["C", "B", "A"]
    assert documents.read_documents(str(tmp_path / "*.txt")) == ["A", "B"]
    odd = txt(tmp_path / "[x].txt", "X")  # a name that is also a pattern
    assert documents.read_documents(odd) == ["X"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    empty, broken = txt(tmp_path / "empty.txt", " \n"), txt(tmp_path / "broken.jsonl", '{"text": ')
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    for source, message in [
        (str(tmp_path / "none.txt"), "source: .*none.txt' does not exist"),
        (str(tmp_path / "*.parquet"), r"source: .*\*.parquet' does not exist"),
        (["none"], "source: 'none' does not exist"),
        (str(tmp_path), "is not a readable .txt, .jsonl, .parquet file"),
        (txt(tmp_path / "a.csv", "a,b"), "is not a readable .txt"),
        (empty, "source: there is no text in .*empty.txt"),
        ([], r"source: there is no text in \[\]"),
        (str(latin), "cannot be read as .txt .*utf-8"),
        (broken, "cannot be read as .jsonl"),
    ]:
        with pytest.raises(QawareError, match=message) as caught:
            documents.read_documents(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(QawareError, match=r"^val_source: "):
        documents.read_documents(empty, key="val_source")


@pytest.mark.usefixtures("offline")
def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert documents.is_hub("Salesforce/wikitext")
    assert documents.is_hub("imdb")
    for local in (
        documents.PYTHON_DOCS,
        "a.txt",
        "data/*.jsonl",
        "./data",
        "~/data",
        str(tmp_path),
        ["a", "b"],
    ):
        assert not documents.is_hub(local)
    asked = []

    def load(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": ["", " = Title = \n", "Body"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = documents.read_documents("Salesforce/wikitext", config="wikitext-2-raw-v1", split="test")
    assert found == ["= Title =", "Body"]
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_hashes_follow_content_not_names(tmp_path: Path) -> None:
    a, b = txt(tmp_path / "a.txt", "same"), txt(tmp_path / "b.txt", "same")
    assert documents.source_hash(a) == documents.source_hash(b) == documents.source_hash([b])
    assert documents.source_hash([a, b]) != documents.source_hash(a)
    before = documents.source_hash(a)
    txt(tmp_path / "a.txt", "other")
    assert documents.source_hash(a) != before
    assert documents.source_hash("hub/a") != documents.source_hash("hub/b")
    assert documents.source_hash(documents.PYTHON_DOCS) == documents.source_hash(documents.PYTHON_DOCS)


@pytest.mark.usefixtures("offline")
def test_an_unreachable_hub_is_said_in_one_line() -> None:
    with pytest.raises(QawareError, match=r"'nobody/nothing' .* could not be read from the hub") as caught:
        documents.read_documents("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.999])
def test_held_out_documents_are_the_last(fraction: float) -> None:
    train, val = documents.hold_out(STORIES, fraction)
    assert train + val == STORIES
    assert len(val) == min(39, max(1, round(40 * fraction)))


def test_one_document_is_held_out_by_its_end() -> None:
    whole = SEPARATOR.join(STORIES)
    train, val = documents.hold_out([whole], 0.2)
    assert whole.startswith(train[0])
    assert whole.endswith(val[0])
    assert " ".join([*train, *val]).split() == whole.split()
    assert 0.18 < len(val[0]) / len(whole) < 0.22
    with pytest.raises(QawareError, match="val_fraction: one document of 4 characters is too short"):
        documents.hold_out(["word"], 0.2)
