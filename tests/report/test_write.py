"""The report: rebuilt from the files of a folder alone, and safe to open."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qaware.errors import QawareError
from qaware.metrics.score import Score
from qaware.report.ledger import Comparison, Ledger
from qaware.report.write import PLOT, REPORT, RESULTS, write_report

Make = Callable[..., Score]


@pytest.fixture
def folder(tmp_path: Path, score: Make) -> Path:
    """A run with a float model, a converted one, and a runtime that failed."""
    ledger = Ledger(tmp_path / RESULTS)
    ledger.add("float", "float", score(10.0, 30.0, 20.0, 15.0), 4000)
    ledger.add(
        "int4", "converted", score(11.0, 31.5, 21.0, 16.0), 600, Comparison("float"), notes=["rounds twice"]
    )
    ledger.add("int4", "tract", None, 0, failed="tract: it died")
    return tmp_path


def about(folder: Path, **values: Any) -> None:
    (folder / "run.json").write_text(json.dumps(values))


def test_it_is_rebuilt_from_results_jsonl(folder: Path) -> None:
    path = write_report(folder)
    first = {name: (folder / name).read_bytes() for name in (REPORT, "report.html", PLOT)}
    assert path == folder / REPORT
    text = path.read_text()
    assert text.startswith(f"# qaware: {folder.name}\n")
    assert "| int4 | converted |" in text
    assert "+0.1125 ±" in text
    assert f"]({PLOT})" in text
    assert "- converted: rounds twice." in text
    assert "- int4, tract FAILED: tract: it died" in text
    for name in first:
        (folder / name).unlink()
    write_report(folder)
    for name in (REPORT, "report.html"):
        assert (folder / name).read_bytes() == first[name]


def test_the_protocol_stands_beside_the_numbers_once(folder: Path, score: Make) -> None:
    lines = [line for line in write_report(folder).read_text().splitlines() if line.startswith("- Protocol")]
    assert lines == [f"- Protocol {score(0.0, 0.0, 0.0, 0.0).fingerprint}: data d, window 11."]


def test_name_machine_and_versions_come_from_run_json(folder: Path) -> None:
    cpu = {"model": "Z80", "machine": "z", "features": ["avx2", "fma"]}
    about(folder, name="trial", status="finished", cpu=cpu, versions={"torch": "2.13", "qaware": "0.1"})
    text = write_report(folder).read_text()
    assert text.startswith("# qaware: trial\n")
    assert "- CPU: Z80 (avx2 fma)." in text
    assert "- Versions: torch 2.13, qaware 0.1." in text
    assert "This run is" not in text


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_that_did_not_finish_says_so(folder: Path, status: str) -> None:
    about(folder, name="trial", status=status)
    words = f"This run is {status}: stages may be missing."
    assert f"- {words}" in write_report(folder).read_text()
    assert words in (folder / "report.html").read_text()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"3", b"null"])
def test_a_broken_run_json_costs_only_what_it_held(folder: Path, content: bytes) -> None:
    (folder / "run.json").write_bytes(content)
    assert write_report(folder).read_text().startswith(f"# qaware: {folder.name}\n")


def test_rows_can_be_given_instead(folder: Path) -> None:
    write_report(folder, [{"model": "given", "stage": "float", "bytes": 1}])
    text = (folder / REPORT).read_text()
    assert "given" in text
    assert "int4" not in text
    assert PLOT not in text


class Page(html.parser.HTMLParser):
    """Collects tags and checks that every opened one is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


EVIL = "<script>alert(1)</script>&\"'"


def test_html_is_escaped_and_whole(tmp_path: Path, score: Make) -> None:
    ledger = Ledger(tmp_path / RESULTS)
    ledger.add(EVIL, EVIL, score(1.0, 2.0, 3.0, 4.0, protocol={"data": EVIL}), 1, notes=[EVIL], failed=EVIL)
    about(tmp_path, name=EVIL, status=EVIL, versions={EVIL: EVIL}, cpu={"model": EVIL, "features": [EVIL]})
    write_report(tmp_path)
    page = Page()
    text = (tmp_path / "report.html").read_text()
    page.feed(text)
    assert "script" not in page.tags
    assert page.open == []
    assert text.count("&lt;script&gt;") >= 8


def test_html_is_one_file_with_the_plot_inside(folder: Path) -> None:
    write_report(folder)
    text = (folder / "report.html").read_text()
    assert "data:image/png;base64,iVBOR" in text
    assert 'src="http' not in text
    assert 'charset="utf-8"' in text
    assert "±" in text


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QawareError, match=r"results\.jsonl: cannot be read"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
