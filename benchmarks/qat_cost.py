"""What a QAT step costs against the float step: ``python -m benchmarks.qat_cost --out qat_cost.json``."""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.qat_cost_cases import ADAPTED, Size, Step, image_step, language_step
from benchmarks.rows import Row, table, write
from qaware import machine

KINDS = ("weight-only", "int8-dynamic")
COMPILED = {"weight-only": 1.05, "int8-dynamic": 1.15}
PUBLISHED = {"weight-only": "torchao 1.08", "int8-dynamic": "torchao 1.29"}
EAGER = 1.25
FASTER, LESS = 1.5, 0.3
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD = -1, -3, 2**25
"""Of glibc's malloc.h; a larger one is refused."""
_SMALLEST_MAPPING = 2**16
WARM_UP = 3
"""Optimizers make their state in the first step, compilers their code in the first two."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qat_cost", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--eager", action="store_true", help="leave out the rows that take a compiler")
    options = parser.parse_args(arguments)
    found = rows(compiled=not options.eager)
    write(found, {"versions": machine.versions(), "cpu": machine.cpu()}, options.out)
    print(table(found))
    return 0


def rows(size: Size | None = None, repeats: int = 9, compiled: bool = True) -> list[Row]:
    """Every row, on one thread.

    Args:
        size: of the models and batches.
        repeats: steps of each kind that are timed.
        compiled: measure the rows of ``torch.compile`` too, which takes minutes.
    """
    size = size or Size()
    _keep_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = _language(size, repeats, compiled=True) if compiled else []
        return [*found, *_language(size, repeats, compiled=False), _images(size, repeats), _memory(size)]
    finally:
        torch.set_num_threads(threads)


def _keep_memory() -> None:
    """Have glibc keep what was freed. Of steps that take turns the smaller one would find its memory there,
    and the larger one would ask the system anew for what it takes beyond that: up to 30 ms in 200."""
    library = ctypes.util.find_library("c")
    if sys.platform == "linux" and library is not None and hasattr(libc := ctypes.CDLL(library), "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


def interleaved(steps: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each step by kind, one of each in turn, so that all see the same machine."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(repeats):
        for kind, step in steps.items():
            started = time.process_time()
            step()
            seconds[kind].append(time.process_time() - started)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], kind: str, base: str = "float") -> float:
    """Median over the rounds of what ``kind`` took against ``base``."""
    return statistics.median(a / b for a, b in zip(seconds[kind], seconds[base], strict=True))


def _language(size: Size, repeats: int, compiled: bool) -> list[Row]:
    kinds = ["float", *KINDS, *(f"torchao {kind}" for kind in KINDS), *([] if compiled else ADAPTED)]
    seconds = interleaved({kind: language_step(kind, size, compiled) for kind in kinds}, repeats)
    how = "compiled" if compiled else "eager"
    case = f"Llama, {size.blocks} blocks of {size.width}, batch {size.windows} x {size.tokens}, {how}"
    found = [
        _step_row(
            f"QAT step against float, {how}, {kind}",
            (PUBLISHED[kind] if compiled else "torchtune 1.3 to 1.5"),
            COMPILED[kind] if compiled else EAGER,
            case,
            seconds,
            (kind, f"torchao {kind}"),
        )
        for kind in KINDS
    ]
    return found if compiled else [*found, _lora_row(case, seconds)]


def _images(size: Size, repeats: int) -> Row:
    kinds = ("float", "int8-static")
    seconds = interleaved({kind: image_step(kind, size) for kind in kinds}, repeats)
    case = f"ResNet{size.depth}, batch {size.images}, observers and folded batch norms, eager"
    return _step_row("QAT step against float, eager, static", "", EAGER, case, seconds, ("int8-static",))


def _step_row(
    row: str, published: str, most: float, case: str, seconds: dict[str, list[float]], kinds: Sequence[str]
) -> Row:
    value = ratio(seconds, kinds[0])
    others = "".join(f", {kind} {ratio(seconds, kind):.2f}" for kind in kinds[1:])
    return Row(
        row=row,
        published=published,
        target=f"at most {most:.2f}",
        value=f"{value:.2f}{others}",
        met=value <= most,
        case=case,
        missed_by="" if value <= most else f"{value - most:.2f}",
        details=[_detail(kind, seconds) for kind in ("float", *kinds)],
    )


def _lora_row(case: str, seconds: dict[str, list[float]]) -> Row:
    value, everywhere = (ratio(seconds, "int8-dynamic", kind) for kind in ADAPTED)
    return Row(
        row="LoRA-QAT against plain QAT, speed",
        published="",
        target=f"at least {FASTER:.1f}x",
        value=f"{value:.2f}x, adapters everywhere {everywhere:.2f}x",
        met=value >= FASTER,
        case=f"{case}, int8-dynamic, adapters in {' and '.join(ADAPTED['lora'])}, peft's default",
        missed_by="" if value >= FASTER else f"{FASTER - value:.2f}x",
        details=[_detail(kind, seconds) for kind in ("float", "int8-dynamic", *ADAPTED)],
    )


def _detail(kind: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    taken = sorted(seconds[kind])
    return {
        "model": kind,
        "milliseconds": statistics.median(taken) * 1e3,
        "least": taken[0] * 1e3,
        "most": taken[-1] * 1e3,
        "against float": ratio(seconds, kind),
    }


def _memory(size: Size) -> Row:
    about = partial(Row, "LoRA-QAT against plain QAT, peak memory", "", f"at least {LESS:.0%} less")
    if not Path("/proc/self/status").exists():
        return about("not measured: needs /proc", None)
    taken = {kind: _peak(kind, size) for kind in ("float", "int8-dynamic", *ADAPTED)}
    saved, everywhere = (1 - taken[kind] / taken["int8-dynamic"] for kind in ADAPTED)
    return about(
        f"{saved:.0%} less, adapters everywhere {everywhere:.0%}",
        saved >= LESS,
        f"Llama as above, three steps in a process each, beyond its libraries; rank {size.rank}",
        "" if saved >= LESS else f"{LESS - saved:.0%}",
        [{"model": kind, "megabytes": value / 1e6} for kind, value in taken.items()],
    )


def _peak(kind: str, size: Size) -> int:
    """In a process of its own; see :func:`benchmarks.qat_cost_cases.peak_bytes`."""
    code = f"from benchmarks.qat_cost_cases import Size, peak_bytes; print(peak_bytes({kind!r}, {size!r}))"
    # Each array is a mapping of its own: what is freed is not counted, whatever lies beside it.
    alone = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(_SMALLEST_MAPPING)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=alone)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
