"""The rounding report in files, and its summary in the report of a run."""

from __future__ import annotations

import json
from pathlib import Path

from qaware.report.rounding import (
    read_rounding,
    rounding_html,
    rounding_section,
    rounding_table,
    summary,
    write_rounding,
)
from qaware.report.write import write_report
from qaware.rounding.report import RoundedLayer, RoundingReport

TIE = "tied to embed: one set of integers"
REPORT = RoundingReport(
    (
        RoundedLayer("head", "awq+gptq", 0.01, 0.02, TIE, "awq: not scaled, its weight is tied"),
        RoundedLayer("a", "awq+gptq", 0.01, 0.04, note="awq: exponent 0.50 in norm, error 0.80 of unscaled"),
        RoundedLayer(
            "b", "awq+gptq", 0.03, 0.02, note="awq: not scaled, its weight is tied; no input was seen"
        ),
        RoundedLayer("c", "awq+gptq", 0.0, 0.0),
        RoundedLayer("d", "awq+gptq"),
    )
)


def test_the_table() -> None:
    lines = rounding_table(REPORT.to_dict()["layers"]).splitlines()
    assert lines[2] == f"| head | awq+gptq | -20.0 | 0.50 | {TIE} | awq: not scaled, its weight is tied |"
    assert lines[5] == "| c | awq+gptq | exact |  |  |  |"
    assert lines[6] == "| d | awq+gptq |  |  |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_the_summary() -> None:
    assert summary(REPORT.to_dict()["layers"]) == [
        "5 layers by awq+gptq; error against rtn's 0.50 in the median, 0.25 to 1.50, worse in 1.",
        "awq: scaled what enters 1 layer; not 2 layers: its weight is tied.",
        f"head is {TIE}.",
        "1 layer: no input was seen.",
    ]


def test_rounding_to_nearest_is_not_compared_with_itself() -> None:
    for method in ("awq+bias-correction", "smoothquant alpha=0.7"):
        nearest = RoundingReport((RoundedLayer("a", method, 0.01, 0.01),))
        assert summary(nearest.to_dict()["layers"]) == [f"1 layer by {method}."]


def test_files(tmp_path: Path) -> None:
    path = write_rounding(REPORT, tmp_path, "int4 ptq")
    assert path == tmp_path / "int4-ptq.rounding.md"
    assert path.read_text().startswith("# int4 ptq: rounding\n\n| layer | method |")
    assert "- awq: scaled what enters 1 layer" in path.read_text()
    assert json.loads((tmp_path / "int4-ptq.rounding.json").read_text())["model"] == "int4 ptq"
    assert [line["name"] for line in read_rounding(tmp_path)["int4 ptq"]] == ["head", "a", "b", "c", "d"]


def test_the_summary_and_the_worst_are_in_the_report_of_the_run(tmp_path: Path) -> None:
    rows = [{"model": "int4 <ptq>", "stage": "converted", "bytes": 3}]
    assert "## Rounding" not in write_report(tmp_path, rows).read_text()
    write_rounding(REPORT, tmp_path / "artifacts", "int4 <ptq>")
    text = write_report(tmp_path, rows).read_text()
    assert text.index("### int4 <ptq>") < text.index("- 5 layers by") < text.index("| b | awq+gptq | -15.2 |")
    assert "| a | awq+gptq |" not in text
    page = (tmp_path / "report.html").read_text()
    assert "<h3>int4 &lt;ptq&gt;</h3><ul><li>5 layers" in page
    assert "<td>b</td>" in page


def test_a_broken_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.rounding.json").write_text("{")
    (tmp_path / "y.rounding.json").write_text('{"model": "y", "layers": [{}]}')
    assert rounding_section(tmp_path) == []
    assert rounding_html(tmp_path) == ""
