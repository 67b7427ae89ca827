"""How the cost of quantizing grows with the model: ``python -m benchmarks.growth --out growth.json``."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth_costs import memory, peak, runner, startup
from benchmarks.growth_steps import SHAPES, TINY, Shape, parameters, steps
from benchmarks.rows import Row, table, write
from qaware import machine
from qaware.exporters import get_exporter

RUNTIMES = ("aoti", "executorch", "tract")
_ALL = {**SHAPES, **TINY}


def rows(quick: bool = False, plot: Path | None = None, sizes: Sequence[str] | None = None) -> list[Row]:
    """Every row, on one thread.

    Args:
        quick: take models so small that the figures mean nothing.
        plot: PNG file to write.
        sizes: measure the growth over these only.
    """
    torch.set_num_threads(1)
    shapes = TINY if quick else {name: SHAPES[name] for name in sizes or SHAPES}
    with tempfile.TemporaryDirectory() as folder:
        return _rows(shapes, plot, Path(folder))


def _rows(shapes: Mapping[str, Shape], plot: Path | None, work: Path) -> list[Row]:
    runtimes = tuple(name for name in RUNTIMES if get_exporter(name).missing() is None)
    found: dict[int, dict[str, float]] = {}
    for name, shape in shapes.items():
        started = time.monotonic()
        found[parameters(shape)] = steps(shape, runtimes, work)
        print(f"  {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    measured = [growth(step, found) for step in dict.fromkeys(s for by in found.values() for s in by)]
    if plot is not None:
        draw(found, plot)
    quick = set(shapes) <= set(TINY)
    name = "tiny" if quick else "30 M" if "30 M" in shapes else max(shapes, key=lambda n: shapes[n].hidden)
    measured += [runner(shapes[name], name, runtime, work, 0.02 if quick else 0.5) for runtime in RUNTIMES]
    measured.append(memory(shapes[name], name))
    return measured + startup()


def growth(step: str, found: Mapping[int, Mapping[str, float]]) -> Row:
    """One step's cost over one forward pass, and the slopes of both on logarithmic axes.

    Args:
        step: its name.
        found: CPU seconds of each step, by parameters; at least one size has it.
    """
    points = {size: by[step] for size, by in found.items() if step in by}
    details = [
        {"model": f"{size / 1e6:.1f} M", "seconds": seconds, "forwards": seconds / found[size]["forward"]}
        for size, seconds in points.items()
    ]
    largest = details[-1]
    value = f"{largest['forwards']:.3g} forward passes at {largest['model']}"
    if len(points) > 1:
        value += f", slope {slope(points):.2f}"
    missing = len(found) - len(points)
    case = "CPU seconds of one thread" + (f"; the {missing} largest would take too long" if missing else "")
    return Row(f"cost of {step}", "", "how it grows", value, True, case, details=details)


def slope(points: Mapping[int, float]) -> float:
    """Of least squares through the logarithms: 1 where the cost is proportional to the parameters."""
    xs, ys = [math.log(x) for x in points], [math.log(max(y, 1e-9)) for y in points.values()]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def draw(found: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """Write a PNG: CPU seconds against parameters, a line for each step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for step in dict.fromkeys(step for by in found.values() for step in by):
        points = {size / 1e6: by[step] for size, by in found.items() if step in by}
        style = {"color": "0.3", "linestyle": "--"} if step == "forward" else {}
        label = f"{step} ({slope({size: by[step] for size, by in found.items() if step in by}):.2f})"
        axes.loglog(list(points), list(points.values()), marker="o", markersize=4, label=label, **style)
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("CPU seconds, one thread")
    axes.set_title("What quantizing costs (slope)")
    axes.grid(alpha=0.25, which="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write JSON and plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that everything runs")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, help="measure the growth over these only")
    parser.add_argument(
        "--peak", choices=_ALL, help="only print the peak memory of GPTQ over the model's bytes"
    )
    options = parser.parse_args(arguments)
    if options.peak:
        torch.set_num_threads(1)
        print(peak(_ALL[options.peak], TINY["tiny"]))
        return 0
    if options.out is None:
        parser.error("--out: is needed")
    found = rows(options.quick, options.plot, options.sizes)
    about: dict[str, Any] = {"versions": machine.versions(), "cpu": machine.cpu()}
    write(found, about, options.out)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
