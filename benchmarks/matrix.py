"""Run every cell of the support matrix that claims to run: ``python -m benchmarks.matrix --out matrix.json``.

Each is quantized, exported, loaded on its runtime and compared with the converted model, at once and, for
a language model, step by step. Takes about an hour; ``--recipes`` and ``--runtimes`` take a part of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import qaware
from benchmarks.rows import Row, table, write
from qaware import machine
from qaware.errors import QawareError
from qaware.exporters import exporter_names, get_exporter
from qaware.exporters.base import Exporter, first_line
from qaware.exporters.decode import in_steps
from qaware.exporters.isolated import IsolatedRunner
from qaware.exporters.signature import Signature, TensorSpec
from qaware.matrix import LANGUAGE, REFUSED, TOKENS, VOCABULARY, Cell, batch, reference, support
from qaware.parity import compare
from qaware.tasks import language_signature


def rows(recipes: Sequence[str] | None, runtimes: Sequence[str] | None, out: Path | None = None) -> list[Row]:
    """One row a cell that claims to run, in the order of the table; written to ``out`` as they come."""
    about = {"versions": machine.versions(), "cpu": machine.cpu()}
    found: list[Row] = []
    for cell in support(recipes, runtimes):
        if cell.state == REFUSED:
            continue
        found.append(row(cell))
        print(f"  {found[-1].row}: {found[-1].value}", file=sys.stderr, flush=True)
        if out is not None:
            write(found, about, out)
    return found


def row(cell: Cell) -> Row:
    """A cell, run; a runtime whose package is absent is said to be."""
    exporter = get_exporter(cell.runtime)
    name = f"{cell.line.recipe}, {cell.line.engine}, {cell.runtime}"
    target, case = "within tolerance", f"{cell.line.network}, {cell.state}"
    if why := exporter.missing():
        return Row(name, "", target, f"skipped: {why}", None, case)
    try:
        with tempfile.TemporaryDirectory() as folder:
            value = run(cell, exporter, Path(folder))
    except QawareError as error:
        return Row(name, "", target, str(error), False, case)
    except Exception as error:
        return Row(name, "", target, first_line(error), False, case)
    return Row(name, "", target, value, True, case)


def run(cell: Cell, exporter: Exporter, folder: Path) -> str:
    """Quantize, export, load and compare.

    Raises:
        QawareError: any of it fails, or the runtime computes something else.
    """
    line = cell.line
    data = [batch(line.network, seed) for seed in range(4)]
    quantized = qaware.quantize(
        reference(line.network), line.recipe, data, len(data), runtimes=[cell.runtime], engine=line.engine
    )
    signature = _signature(line.network, data[0])
    artifact = exporter.export(quantized, (data[0],), signature, folder / f"cell{exporter.suffix}")
    expected = signature.wrap(exporter.reference(quantized)).eval()
    tolerance, grids = exporter.tolerance_for(quantized.plan), list(quantized.outputs.values())
    inputs = [(x,) for x in (*data[1:], _shorter(data[0]))]
    with IsolatedRunner(artifact) as runner:
        parity = compare(runner, expected, inputs, grids)
        parity.require(artifact.path.name, tolerance)
        if runner.length:
            compare(in_steps(runner), expected, inputs[:1], grids).require("step by step", tolerance)
    return f"{parity.relative:.1e} of {tolerance.relative:.0e}, {artifact.bytes:,} bytes"


def _signature(network: str, example: Tensor) -> Signature:
    if network == LANGUAGE:
        return language_signature("ids", VOCABULARY, TOKENS)
    spec = TensorSpec("images", "float32", ("batch", *example.shape[1:]))
    return Signature((spec,), {"batch": (1, len(example))})


def _shorter(x: Tensor) -> Tensor:
    """Fewer tokens, or a single image."""
    return x[:, :5] if x.dim() == 2 else x[:1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 where a cell does not hold what it claims."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="these only")
    parser.add_argument("--runtimes", nargs="+", choices=exporter_names(), help="these only")
    options = parser.parse_args(arguments)
    found = rows(options.recipes, options.runtimes, options.out)
    print(table(found))
    counts = Counter(row.met for row in found)
    print(f"{counts[True]} cells hold, {counts[False]} do not, {counts[None]} were skipped")
    return int(counts[False] > 0)


if __name__ == "__main__":
    sys.exit(main())
