"""Cells of the support matrix, run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import matrix
from qaware.errors import ParityError
from qaware.exporters import get_exporter

pytestmark = pytest.mark.skipif(get_exporter("tract").missing() is not None, reason="tract is not installed")
PART = ["--recipes", "int4-weight-only", "--runtimes", "tract"]


def test_a_cell_that_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "matrix.json"
    assert matrix.main([*PART, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text("utf-8"))["rows"]
    assert (row["row"], row["met"]) == ("int4-weight-only, modules, tract", True)
    assert "1 cells hold, 0 do not, 0 were skipped" in capsys.readouterr().out


def test_one_that_does_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def differ(*args: object) -> str:
        raise ParityError("cell.nnef.tgz: computes something else")

    monkeypatch.setattr(matrix, "run", differ)
    assert matrix.main(PART) == 1
    printed = capsys.readouterr().out
    assert "0 cells hold, 1 do not" in printed
    assert "cell.nnef.tgz: computes something else" in printed


def test_a_runtime_that_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(get_exporter("tract")), "missing", lambda self: "tract: not here")
    assert matrix.main(PART) == 0
    assert "skipped: tract: not here" in capsys.readouterr().out
