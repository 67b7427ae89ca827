"""The plot: nats lost against bytes, on every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qaware.files import atomic
from qaware.report.ledger import Row

_MARKERS = "osD^vP*X"
# Float and prepared models weigh as much as ever; beside the files that ship they would set the scale.
_NOT_SHIPPED = ("float", "prepared")


def plot_loss(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Write a PNG; False when no row has a difference to plot.

    Args:
        rows: of one ledger; quantized stages with ``d_nats`` become points, a colour a model and a
            marker a stage.
        path: of the image.
        title: above the plot.
    """
    # The object interface, not pyplot: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [r for r in rows if r.get("d_nats") is not None and r["stage"] not in _NOT_SHIPPED]
    if not points:
        return False
    models = list(dict.fromkeys(row["model"] for row in points))
    stages = list(dict.fromkeys(row["stage"] for row in points))
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in points:
        axes.errorbar(
            row["bytes"] / 1e6,
            row["d_nats"],
            yerr=row.get("d_nats_ci95"),
            fmt=_MARKERS[stages.index(row["stage"]) % len(_MARKERS)],
            color=f"C{models.index(row['model'])}",
            capsize=2,
            elinewidth=0.8,
            markersize=7,
            alpha=0.85,
        )
    axes.axhline(0, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_xlabel("size (MB)")
    axes.set_ylabel("nats lost against the float model")
    axes.set_title(title)
    axes.set_xlim(0, 1.1 * max(row["bytes"] for row in points) / 1e6)
    axes.grid(alpha=0.25)
    colors = [axes.plot([], [], color=f"C{i}", linewidth=6, label=m)[0] for i, m in enumerate(models)]
    shapes = [
        axes.plot([], [], _MARKERS[i % len(_MARKERS)], color="0.4", linestyle="", label=s)[0]
        for i, s in enumerate(stages)
    ]
    figure.legend(handles=[*colors, *shapes], loc="outside right upper", frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return True
