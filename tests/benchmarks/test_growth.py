"""The benchmark of growth on tiny models; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import growth, growth_costs
from benchmarks.growth_steps import TINY, parameters, steps
from benchmarks.rows import Row


def test_slope() -> None:
    assert growth.slope({10: 3.0, 100: 30.0, 1000: 300.0}) == pytest.approx(1)
    assert growth.slope({10: 1.0, 1000: 1e4}) == pytest.approx(2)
    assert growth.slope({10: 7.0, 1000: 7.0}) == pytest.approx(0)


def test_a_row_says_what_a_step_costs() -> None:
    found = {10**6: {"forward": 0.5, "gptq": 5.0, "aoti": 1.0}, 10**7: {"forward": 2.0, "gptq": 50.0}}
    row = growth.growth("gptq", found)
    assert row.value == "25 forward passes at 10.0 M, slope 1.00"
    assert [detail["forwards"] for detail in row.details] == [10, 25]
    row = growth.growth("aoti", found)
    assert row.value == "2 forward passes at 1.0 M"
    assert "the 1 largest would take too long" in row.case


def test_steps_and_plot(tmp_path: Path) -> None:
    found = {parameters(shape): steps(shape, (), tmp_path) for shape in TINY.values()}
    for by in found.values():
        assert list(by) == ["forward", "calibration", "rtn", "gptq", "scoring"]
    growth.draw(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_runner_beside_its_runtime(tmp_path: Path) -> None:
    pytest.importorskip("tract")
    row = growth_costs.runner(TINY["tiny"], "tiny", "tract", tmp_path, 0.001)
    assert row.details[0]["scored"] > 0
    assert "bare" in row.value


@pytest.mark.skipif(not growth_costs._STATUS.exists(), reason="needs /proc")
def test_peak_memory() -> None:
    assert growth_costs.peak(TINY["tiny"], TINY["tiny"]) >= 1


def test_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth_costs, "_TIMES", 1)
    assert [row.row for row in growth_costs.startup()] == ["`import qaware` beyond torch", "`qaware --help`"]


def test_json_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "rows", lambda quick, plot, sizes: [Row("a", "", "b", "c", quick)])
    assert growth.main(["--out", str(tmp_path / "growth.json"), "--quick"]) == 0
    assert json.loads((tmp_path / "growth.json").read_text())["rows"][0]["met"] is True
