"""What each layer costs: a table for the terminal and for GitHub, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaware.files import atomic, write_json, write_text
from qaware.report.table import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from qaware.mixed.sensitivity import LayerSensitivity, Sensitivity

STEM = "sensitivity"
BARS = 60
"""Layers of the plot; the table has all."""
_HEADINGS = ("layer", "scheme", "weights", "size", "d-nats", "KL", "estimate")


def write_sensitivity(result: Sensitivity, folder: Path, title: str) -> Path:
    """Write ``sensitivity.md``, ``.json`` and ``.png`` into ``folder`` and return the path of the first."""
    path = folder / f"{STEM}.md"
    table = _markdown(result)
    notes = "\n".join(f"- {note}" for note in sensitivity_notes(result))
    write_text(path, f"# {title}: what each layer costs\n\n{table}\n{notes}\n\n![nats lost]({STEM}.png)\n")
    write_json(folder / f"{STEM}.json", result.to_dict())
    plot_sensitivity(result, folder / f"{STEM}.png", f"{title}: {result.recipe}, one layer at a time")
    return path


def sensitivity_cells(result: Sensitivity) -> list[list[str]]:
    """Text of each layer's line, worst first."""
    return [_cells(layer) for layer in result.layers]


def sensitivity_notes(result: Sensitivity) -> list[str]:
    """What the numbers mean, and what all layers cost together."""
    notes = []
    if result.together is not None:
        total = sum(x.exact.d_nats for x in result.layers if x.exact is not None)
        notes += [
            "d-nats: nats more than the float model with this layer alone quantized, with the half width of "
            f"a paired 95% interval, on {result.windows} windows or batches; KL: divergence from that model",
            f"all layers together: {result.together.d_nats:+.4f} ±{result.together.ci95:.4f}; "
            f"their sum: {total:+.4f}",
        ]
    if any(layer.estimate is not None for layer in result.layers):
        notes.append(
            "estimate: half the sum of squared gradients times squared errors of rounding to nearest, in nats"
        )
    if result.rank_correlation is not None:
        notes.append(f"rank correlation (Spearman) of estimate and KL: {result.rank_correlation:.3f}")
    if any(len(layer.layers) > 1 for layer in result.layers):
        notes.append("layers with = between them are tied: one weight, quantized and counted once")
    return notes


def print_sensitivity(result: Sensitivity, title: str, **console: Any) -> None:
    """Print with rich, never narrower than the table."""
    from rich.console import Console
    from rich.measure import Measurement

    table = _rich(result, title)
    screen = Console(**console)
    width = Measurement.get(screen, screen.options.update(max_width=400), table).maximum
    Console(**{**console, "width": max(width, screen.width)}).print(table)


def plot_sensitivity(result: Sensitivity, path: Path, title: str) -> None:
    """Write a PNG: a bar a layer, the most expensive on top, with intervals; estimates as diamonds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = result.layers[:BARS]
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(shown))
    measured = [layer.exact for layer in shown]
    if result.together is not None:
        values = [cost.d_nats if cost else 0.0 for cost in measured]
        # An interval of one window is infinite, which cannot be drawn.
        widths = [cost.ci95 if cost and cost.ci95 < float("inf") else 0.0 for cost in measured]
        axes.barh(places, values, xerr=widths, color="C0", alpha=0.8, error_kw={"elinewidth": 0.9}, capsize=2)
    if any(layer.estimate is not None for layer in shown):
        estimates = [layer.estimate or 0.0 for layer in shown]
        axes.plot(estimates, places, "D", color="C1", markersize=4, label="estimate", linestyle="")
        axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(places, [_short(layer) for layer in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("nats lost with this layer alone quantized")
    more = len(result.layers) - len(shown)
    axes.set_title(
        title + (f" (the first {len(shown)} of {len(result.layers)})" if more else ""), fontsize=10
    )
    axes.grid(axis="x", alpha=0.25)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _short(layer: LayerSensitivity) -> str:
    """A long name from its end, where it differs from others."""
    name = layer.label
    return name if len(name) <= 48 else f"…{name[-47:]}"


def _cells(layer: LayerSensitivity) -> list[str]:
    cost = layer.exact
    return [
        layer.label,
        layer.scheme,
        f"{layer.numel:,}",
        size_text(layer.bytes),
        "" if cost is None else f"{cost.d_nats:+.4f} ±{cost.ci95:.4f}",
        "" if cost is None else f"{cost.kl:.2e}",
        "" if layer.estimate is None else f"{layer.estimate:.2e}",
    ]


def _kept(result: Sensitivity) -> list[int]:
    """Columns that some line fills."""
    body = sensitivity_cells(result)
    return [i for i in range(len(_HEADINGS)) if any(line[i] for line in body)]


def _markdown(result: Sensitivity) -> str:
    kept = _kept(result)
    lines = [
        _row([_HEADINGS[i] for i in kept]),
        "|" + "|".join("---" if i < 2 else "---:" for i in kept) + "|",
    ]
    lines += [_row([line[i] for i in kept]) for line in sensitivity_cells(result)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rich(result: Sensitivity, title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    caption = "\n".join(sensitivity_notes(result))
    table = Table(title=escape(title), header_style="bold", caption=escape(caption), caption_justify="left")
    kept = _kept(result)
    for i in kept:
        table.add_column(_HEADINGS[i], justify="left" if i < 2 else "right", no_wrap=True)
    for line in sensitivity_cells(result):
        table.add_row(*(escape(line[i]) for i in kept))
    return table
