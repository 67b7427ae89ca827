"""Options of a TextDataModule: which are refused at once, and which decide where tokens are cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qaware.errors import QawareError

from .stories import SEPARATOR, STORIES


@pytest.mark.parametrize(
    "change",
    [{"tokenizer": 301}, {"bos": False}, {"layout": "documents"}, {"separator": "0"}, {"val_fraction": 0.2}],
    ids=str,
)
def test_what_changes_tokens_has_a_folder_of_its_own(make: Any, change: dict[str, Any]) -> None:
    assert make(**change).folder != make().folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size: 1 is too small; use 2 or more"),
        ({"batch_size": 0}, "batch_size: 0 is too small"),
        ({"num_workers": -1}, "num_workers: -1"),
        ({"max_documents": 0}, "max_documents: 0"),
        ({"max_val_windows": 0}, "max_val_windows: 0"),
        ({"val_fraction": 1.0}, "val_fraction: 1.0 must lie between 0 and 1"),
        ({"layout": "pakced"}, "layout: 'pakced' is unknown; use one of packed, documents"),
        ({"tokenizer": 257}, "tokenizer: 257 tokens are too few; use 258"),
        ({"tokenizer": "12"}, "tokenizer: 12 tokens are too few"),
    ],
)
def test_options_are_checked_at_once(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QawareError, match=message):
        make(**options)


def test_changed_text_is_read_again(make: Any, stories: str) -> None:
    before = make()
    before.setup()
    Path(stories).write_text(SEPARATOR.join(STORIES[::-1]))
    assert make().folder != before.folder
    assert make().windows().protocol() != before.windows().protocol()


def test_the_cache_folder_comes_from_the_option_or_the_environment(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAWARE_CACHE", str(tmp_path / "env"))
    assert make(cache_dir=None).cache_dir == tmp_path / "env"
    monkeypatch.delenv("QAWARE_CACHE")
    assert make(cache_dir=None).cache_dir == Path("~/.cache/qaware").expanduser()
    (tmp_path / "file").write_text("")
    with pytest.raises(QawareError, match=r"cache_dir: '.*file' cannot be written .*QAWARE_CACHE"):
        make(cache_dir=str(tmp_path / "file")).prepare_data()
