"""Tables and plots of what layers cost and of what a search found."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from qaware.mixed.found import Found, Point
from qaware.mixed.prices import Price
from qaware.mixed.sensitivity import LayerSensitivity, Sensitivity
from qaware.mixed.trial import Cost
from qaware.recipe import Recipe
from qaware.report.search import _ends, plot_frontier, search_lines
from qaware.report.sensitivity import BARS, plot_sensitivity, print_sensitivity, write_sensitivity

RECIPE = Recipe.from_dict({"name": "mixed", "rules": [{"type": "Linear", "scheme": {"bits": 4}}]})


def layer(number: int, exact: bool = True, estimate: float | None = None) -> LayerSensitivity:
    names = ("embed", "head") if number == 0 else (f"layers.{number}.up",)
    cost = Cost(0.5 / (1 + number), 0.01, 0.4 / (1 + number)) if exact else None
    return LayerSensitivity(names, "int4 g32", 4096, 2304, cost, estimate)


def report(count: int = 3, exact: bool = True, estimate: bool = False) -> Sensitivity:
    layers = tuple(layer(i, exact, 0.3 / (1 + i) if estimate else None) for i in range(count))
    together = Cost(1.25, 0.02, 1.0) if exact else None
    rank = 0.9 if exact and estimate else None
    return Sensitivity("low", "f00d", layers, together, rank, 32, 1.5, {"data": "d"})


def found(ci95: float = 0.01) -> Found:
    points = [
        Point((b, b), b + 0.5, 1000 * b, 2.0 ** (-2 * b), Cost(2.0 ** (-2 * b), ci95, 0.1)) for b in (3, 4)
    ]
    mixed = Point((3, 4), 4.0, 3500, 0.01, Cost(-0.001, ci95, 0.01))
    prices = ((("a",), (Price("int3 channel", 1, 0.1, None),)),)
    between = Point((3, 4), 3.9, 3400, 0.011, None)
    return Found(RECIPE, mixed, (0.012, 0.002), (points[0], between, points[1]), tuple(points), prices)


def png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_three_files_are_written(tmp_path: Path) -> None:
    path = write_sensitivity(report(estimate=True), tmp_path / "out", "tiny")
    assert sorted(p.name for p in path.parent.iterdir()) == [
        f"sensitivity.{x}" for x in ("json", "md", "png")
    ]
    assert png(path.with_suffix(".png"))
    text = path.read_text(encoding="utf-8")
    assert "| embed = head | int4 g32 | 4,096 | 2.30 kB | +0.5000 ±0.0100 | 4.00e-01 | 3.00e-01 |" in text
    assert "all layers together: +1.2500 ±0.0200; their sum: +0.9167" in text
    assert "Spearman) of estimate and KL: 0.900" in text
    assert "tied: one weight" in text
    data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert data["layers"][0]["exact"] == {"d_nats": 0.5, "ci95": 0.01, "kl": 0.4}


def test_columns_that_nothing_fills_are_left_out(tmp_path: Path) -> None:
    text = write_sensitivity(report(exact=False, estimate=True), tmp_path, "t").read_text(encoding="utf-8")
    assert "| layer | scheme | weights | size | estimate |" in text
    assert "together" not in text


def test_the_terminal_table_is_never_cut() -> None:
    out = StringIO()
    print_sensitivity(report(), "a [title]", file=out, width=20)
    assert "+0.5000 ±0.0100" in out.getvalue()
    assert "a [title]" in out.getvalue()


def test_many_layers_are_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    seen: dict[str, Any] = {}
    draw = Axes.barh

    def spy(self: Axes, y: Any, width: Any, **options: Any) -> Any:
        seen.update(width=list(width), xerr=list(options["xerr"]))
        return draw(self, y, width, **options)

    monkeypatch.setattr(Axes, "barh", spy)
    plot_sensitivity(report(100), tmp_path / "many.png", "t")
    assert len(seen["width"]) == len(seen["xerr"]) == BARS
    assert seen["width"][:2] == [0.5, 0.25]
    assert png(tmp_path / "many.png")


def test_the_search_beside_uniform_widths() -> None:
    lines = search_lines(found())
    assert [line.split("  ")[0] for line in lines[:3]] == ["all 3 bits", "mixed", "all 4 bits"]
    assert "4.000 bpw" in lines[1]
    assert "-0.0010 ±0.0100 nats" in lines[1]
    assert lines[3].endswith("+0.0120 ±0.0020 nats")


def test_intervals_end_where_they_do_on_an_axis_that_ends_above_zero() -> None:
    def end(d_nats: float, ci95: float) -> tuple[float, float]:
        ((_, low, up),) = _ends([Point((3,), 3.5, 1, 0.1, Cost(d_nats, ci95, 0.1))])
        return low, up

    assert end(0.5, 0.1) == pytest.approx((0.4, 0.6))
    assert end(0.5, 0.7) == pytest.approx((1e-5, 1.2))
    assert end(-0.5, 0.1) == (1e-5, 1e-5)
    assert end(0.5, math.inf) == (0.5, 0.5)


@pytest.mark.parametrize("ci95", [0.01, math.inf])
def test_the_frontier_is_drawn(ci95: float, tmp_path: Path) -> None:
    plot_frontier(found(ci95), tmp_path / "search.png", "t")
    assert png(tmp_path / "search.png")
    data = json.dumps(found(ci95).to_dict(), allow_nan=False)
    assert ("null" in data) is (found(ci95).frontier[1].measured is None)
