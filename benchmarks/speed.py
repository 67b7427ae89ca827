"""The targets of speed in one run: ``python -m benchmarks.speed --out speed.json``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.contender import OURS, RUNTIMES, runtime
from benchmarks.inputs import SIZES
from benchmarks.measuring import build, measure
from benchmarks.rows import Row, table, write
from benchmarks.speed_rows import Key, Results, Target, row, targets
from qaware import machine

OTHERS = {"qat": "benchmarks.qat_cost", "growth": "benchmarks.growth"}
"""Rows that measure no artifact: modules with ``rows() -> list[Row]``."""
GROUPS = (*dict.fromkeys(t.group for t in targets()), *OTHERS)
PEERS = tuple(name for name in RUNTIMES if name not in OURS)
_PACKAGES = (
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "ai-edge-litert",
    "litert-torch",
    "ai-edge-quantizer",
    "gguf",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write JSON."""
    options = _options(arguments)
    counts = {"1": [1], "all": [_cores()], "both": sorted({1, _cores()})}[options.threads]
    with tempfile.TemporaryDirectory() as folder:
        about = _about(options.size)
        rows, results = run(options, counts, options.work or Path(folder), about)
    about["load_after"] = _load()
    about["contenders"] = [m.detail() | {"of": key[1]} for key, m in results.measured.items()]
    about["skipped"] = {" ".join(key): why for key, why in results.skipped.items()}
    write(rows, about, options.out)
    print(table(rows))
    print(contenders(results))
    return 0


def run(
    options: argparse.Namespace, threads: Sequence[int], work: Path, about: dict[str, Any]
) -> tuple[list[Row], Results]:
    """The rows that were asked for, written after each part."""
    asked = [t for t in targets() if t.group in options.rows]
    started = time.monotonic()
    results = build(_needed(asked, options.peers), options.size, work)
    measure(results, options.size, threads, work)
    print(f"  artifacts: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    rows = [row(target, results, threads) for target in asked]
    write(rows, about, options.out)
    for name in (n for n in OTHERS if n in options.rows):
        rows += _others(name)
        write(rows, about, options.out)
    return rows, results


def _needed(asked: Iterable[Target], peers: Sequence[str]) -> list[Key]:
    """What the targets compare, and every form of the chosen peers on the models that these are about."""
    keys = [key for t in asked for key in t.keys if key[0] in OURS or key[0] in peers]
    models = {key[1] for t in asked if t.group in ("peers", "cnn") for key in t.keys}
    more = [(n, m, v) for n in peers for m in sorted(models) for v in runtime(n).variants.get(m, ())]
    return [*keys, *more]


def _others(name: str) -> list[Row]:
    """Rows of another file; one that is not there or fails says so."""
    try:
        found: list[Row] = importlib.import_module(OTHERS[name]).rows()
    except Exception as error:  # must not cost the rows that are measured already
        why = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        return [Row(name, "", "", why, None)]
    return found


def contenders(results: Results) -> str:
    """A line for each contender: speed, file, first load, memory, distance to the float model."""
    lines = ["## Contenders", ""]
    for key, measured in sorted(results.measured.items(), key=lambda item: (item[0][1], item[0])):
        detail = measured.detail()
        values = [
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in detail.items() if v is not None
        ]
        lines.append(f"- {key[1]}, " + ", ".join(value.removeprefix("model ") for value in values))
    lines += [f"- {' '.join(key)}: {why}" for key, why in results.skipped.items()]
    return "\n".join(lines) + "\n"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rows", nargs="+", choices=GROUPS, default=GROUPS, help="measure these only")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="compare with these only")
    parser.add_argument("--threads", choices=("1", "all", "both"), default="both", help="of each runtime")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny only shows that it runs")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps the artifacts; what is there is not made again"
    )
    return parser.parse_args(arguments)


def _about(size: str) -> dict[str, Any]:
    found = machine.versions()
    for package in (*_PACKAGES, "llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    here = {**machine.cpu(), "cores": _cores(), "load": _load()}
    return {"machine": here, "versions": found, "size": size}


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> float:
    """Processes that wanted to run over the last minute, on average; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


if __name__ == "__main__":
    sys.exit(main())
