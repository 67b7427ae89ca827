"""What a search found: a few lines for the terminal, and the plot of its frontier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from qaware.files import atomic

if TYPE_CHECKING:
    from qaware.mixed.found import Found, Point

_LEAST = 1e-5
"""Nats below which a loss is noise; the axis is logarithmic and ends there."""


def search_lines(found: Found) -> list[str]:
    """The recipe beside one width for all layers, the smallest first."""
    points = [(f"all {max(p.bits)} bits", p) for p in found.uniform] + [(found.recipe.name, found.point)]
    lines = [_line(label, point) for label, point in sorted(points, key=lambda pair: pair[1].bytes)]
    if found.held_out is not None:
        lines.append(
            "on the windows that nothing was chosen by: "
            f"{found.held_out[0]:+.4f} ±{found.held_out[1]:.4f} nats"
        )
    return lines


def plot_frontier(found: Found, path: Path, title: str) -> None:
    """Write a PNG: nats lost against bits for each weight, of the frontier, uniform widths and the recipe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [p.bpw for p in found.frontier],
        [max(p.predicted, _LEAST) for p in found.frontier],
        color="0.6",
        linewidth=1,
        label="frontier, costs of the layers added up",
    )
    measured = [p for p in found.frontier if p.measured is not None]
    for points, style, color, label in (
        (measured, "o-", "C0", "frontier, measured"),
        (list(found.uniform), "s--", "C1", "one width for all layers"),
        ([found.point], "*", "C3", found.recipe.name),
    ):
        _draw(axes, points, style, color, label)
    for point in found.uniform:
        place = (point.bpw, _height(point))
        axes.annotate(
            f"int{max(point.bits)}", place, (5, 5), textcoords="offset points", color="C1", fontsize=8
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits for each quantized weight, with scales")
    axes.set_ylabel("nats lost against the float model")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _draw(axes: object, points: list[Point], style: str, color: str, label: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    size = 14 if style == "*" else 5
    axes.errorbar(
        [p.bpw for p in points],
        [_height(p) for p in points],
        yerr=[
            [_height(p) - low for p, low, _ in _ends(points)],
            [up - _height(p) for p, _, up in _ends(points)],
        ],
        fmt=style,
        color=color,
        label=label,
        markersize=size,
        linewidth=1,
        capsize=2,
        elinewidth=0.8,
        zorder=4 if style == "*" else 3,
    )


def _height(point: Point) -> float:
    return _LEAST if point.measured is None else max(point.measured.d_nats, _LEAST)


def _ends(points: list[Point]) -> list[tuple[Point, float, float]]:
    """Where the interval of each begins and ends, no lower than the axis does. One of a single window is
    infinite, which cannot be drawn."""
    costs = [(p, p.measured) for p in points]
    known = [(p, c.d_nats if c else 0.0, c.ci95 if c and math.isfinite(c.ci95) else 0.0) for p, c in costs]
    return [(p, max(value - width, _LEAST), max(value + width, _LEAST)) for p, value, width in known]


def _line(label: str, point: Point) -> str:
    cost = point.measured
    loss = "" if cost is None else f"{cost.d_nats:+.4f} ±{cost.ci95:.4f} nats, KL {cost.kl:.2e}"
    return f"{label:<36} {point.bpw:6.3f} bpw  {point.bytes:>12,} bytes  {loss}"
