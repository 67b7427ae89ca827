"""The targets of quality in one run: ``python -m benchmarks.quality --out quality.json``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.case import Case, quiet
from benchmarks.quality_cases import stories, text_model
from benchmarks.quality_mixed import mixed
from benchmarks.quality_ptq import gptq_in_tract, ladder, order
from benchmarks.quality_qat import int4, two_bits
from benchmarks.quality_smooth import smoothing
from benchmarks.rows import Row, table, write
from qaware import machine

Measure = Callable[[Case], list[Row]]
STORIES: dict[str, Measure] = {
    "gptq": gptq_in_tract,
    "order": lambda case: order(case, 4),
    "smoothquant": smoothing,
    "ladder": ladder,
    "mixed": lambda case: mixed(case, 3),
    "int4": int4,
    "two-bits": two_bits,
}
TEXT: dict[str, Measure] = {
    "order": lambda case: order(case, 2),
    "ladder": ladder,
    "mixed": lambda case: mixed(case, 2),
}
"""At 2 bits, because a model that fits its text this well loses next to nothing at 4 and little at 3."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder with stories260K")
    names = sorted({*STORIES, *TEXT})
    parser.add_argument("--rows", nargs="+", choices=names, default=names, help="measure these only")
    options = parser.parse_args(arguments)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        rows = measure(options.shared, Path(folder), options.rows, options.out)
    print(table(rows))
    return 0


def measure(shared: Path, folder: Path, wanted: Sequence[str], out: Path) -> list[Row]:
    """Every wanted row of both models; a row that fails says why and leaves the others alone."""
    rows: list[Row] = []
    about: dict[str, Any] = {"versions": machine.versions(), "cpu": machine.cpu(), "protocols": {}}
    for name, make, measures in (
        ("stories260K", lambda: stories(shared, folder / "stories"), STORIES),
        ("python-docs 5.5M", lambda: text_model(folder / "text"), TEXT),
    ):
        chosen = {key: measures[key] for key in wanted if key in measures}
        case = make() if chosen else None
        if chosen and case is None:
            rows += [_skipped(name, key, f"skipped: {shared} has no {name}") for key in chosen]
        elif case is not None:
            about["protocols"][case.name] = {
                "fingerprint": case.fingerprint,
                **case.score("float", "float").protocol,
            }
            for key, function in chosen.items():
                rows += _measured(case, key, function)
                write(rows, about, out)
    write(rows, about, out)
    return rows


def _measured(case: Case, key: str, function: Measure) -> list[Row]:
    started = time.monotonic()
    try:
        rows = function(case)
    except Exception as error:  # one row that cannot be measured must not cost the others
        rows = [_skipped(case.name, key, f"failed: {' '.join(str(error).split())}")]
    for row in rows:
        print(f"{row.row}: {row.value} (to reach: {row.target})", flush=True)
    print(f"  {case.name}, {key}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def _skipped(name: str, key: str, why: str) -> Row:
    return Row(f"{key}, {name}", "", "", why, None, name)


if __name__ == "__main__":
    sys.exit(main())
