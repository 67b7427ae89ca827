"""The layer report in files, and its worst lines in the report of a run."""

from __future__ import annotations

import json
from pathlib import Path

from qaware.layers import LayerError, LayerReport
from qaware.report.layers import layer_table, read_layers, worst_html, worst_section, write_layers
from qaware.report.write import write_report

REPORT = LayerReport(
    (
        LayerError("a", "Conv2d", 1, 12.34, 40.0, 0.5, 0.25, 0.125),
        LayerError("b.qaware_operations.add_0", "add", 2, -200.0, output_clipped=0.0),
        *(LayerError(f"c{i}", "Linear", 3, 200.0, 30.0 + i) for i in range(5)),
        LayerError("unknown", "Linear"),
    ),
    ("a note",),
)


def test_the_table() -> None:
    lines = layer_table(REPORT.to_dict()["layers"]).splitlines()
    assert lines[2] == "| a | Conv2d | 12.3 | 40.0 | 50.00% | 25.00% | 12.50% |"
    assert lines[3] == "| b.qaware_operations.add_0 | add | broken |  |  | 0.00% |  |"
    assert lines[4] == "| c0 | Linear | exact | 30.0 |  |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_files_and_the_worst_five(tmp_path: Path) -> None:
    path = write_layers(REPORT, tmp_path, "int8 ptq")
    assert path == tmp_path / "int8-ptq.layers.md"
    assert "- a note." in path.read_text()
    assert "| unknown |" in path.read_text()
    assert json.loads((tmp_path / "int8-ptq.layers.json").read_text())["model"] == "int8 ptq"
    assert [line["name"] for line in read_layers(tmp_path)["int8 ptq"]] == [
        *("a", "b.qaware_operations.add_0", "c0", "c1", "c2")
    ]


def test_they_are_in_the_report_of_the_run(tmp_path: Path) -> None:
    rows = [{"model": "int8 <ptq>", "stage": "converted", "bytes": 3}]
    text = write_report(tmp_path, rows).read_text()
    assert "Worst layers" not in text
    write_layers(REPORT, tmp_path / "artifacts", "int8 <ptq>")
    text = write_report(tmp_path, rows).read_text()
    assert "## Worst layers" in text
    assert text.index("int8 <ptq>") < text.index("| a | Conv2d | 12.3 |")
    page = (tmp_path / "report.html").read_text()
    assert "<h3>int8 &lt;ptq&gt;</h3>" in page
    assert "<td>12.3</td>" in page


def test_a_broken_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.layers.json").write_text("{")
    (tmp_path / "y.layers.json").write_text('{"model": "y", "layers": [{}]}')
    assert worst_section(tmp_path) == []
    assert worst_html(tmp_path) == ""
