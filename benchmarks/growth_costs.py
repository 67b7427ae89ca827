"""What does not grow: memory beside the model, a runner beside its bare runtime, and start-up."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

import qaware
from benchmarks.growth_steps import EXPORTED, Shape, language_model, recipe, task_of, texts
from benchmarks.rows import Row
from benchmarks.timing import interleaved, speedup
from benchmarks.workers import POOLS
from qaware.exporters import get_exporter
from qaware.exporters.isolated import IsolatedRunner
from qaware.rounding.rounder import Rounder

WINDOWS = 32
"""That are scored: the last is measured when nothing runs any more, which a text of a few would overstate."""
_STATUS = Path("/proc/self/status")
_IMPORT = "import time, torch; a = time.process_time(); import qaware; print(time.process_time() - a)"
_HELP = "import time, sys; from qaware.cli import main; sys.argv[1:] = ['--help']; main()"
_TIMES = 5


def runner(shape: Shape, name: str, runtime: str, folder: Path, seconds: float) -> Row:
    """Scoring an artifact in its child process against calling it in this one."""
    exporter = get_exporter(runtime)
    if why := exporter.missing():
        return Row(
            f"scoring through our runner, {runtime}", "", "at most 1.1x", f"skipped: {why}", None, name
        )
    quantized = qaware.quantize(language_model(shape), EXPORTED)
    task = task_of(dataclasses.replace(shape, windows=WINDOWS))
    artifact = exporter.export(
        quantized,
        task.example,
        task.signature,
        folder / f"{runtime}-{name.replace(' ', '')}{exporter.suffix}",
    )
    bare, inputs = (
        exporter.open(artifact.path, artifact.signature),
        [i.unsqueeze(0) for i in task.windows.ids],
    )
    # Its process would take all cores, which this one leaves it.
    one = mock.patch.dict(os.environ, dict.fromkeys(POOLS, "1"))
    with one, IsolatedRunner(artifact) as isolated:
        blocks: dict[str, Callable[[int], tuple[float, float]]] = {
            "bare": lambda count: _timed(lambda: _each(bare, inputs), count),
            "called": lambda count: _timed(lambda: _each(isolated, inputs), count),
            "scored": lambda count: _timed(lambda: task.score(isolated), count),
        }
        timings = interleaved(blocks, 7, seconds)
    ratio, called = (speedup(timings["bare"], timings[key], "wall") for key in ("scored", "called"))
    detail = {
        "model": name,
        "bare_s": timings["bare"].seconds("wall") / len(inputs),
        "called": called.median,
        "scored": ratio.median,
    }
    value = f"{ratio} bare, of which the way there and back {called}"
    met = ratio.median <= 1.1
    return Row(
        f"scoring through our runner, {runtime}", "", "at most 1.1x", value, met, name, details=[detail]
    )


def memory(shape: Shape, name: str) -> Row:
    """Peak memory of GPTQ, layer by layer, over the model's bytes; in a process of its own."""
    row = "peak memory of layer-by-layer GPTQ over the model's bytes"
    if not _STATUS.exists():
        return Row(row, "", "at most 1.5x", "skipped: needs /proc", None, name)
    command = [sys.executable, "-m", "benchmarks.growth", "--peak", name]
    # What is freed goes back to the system at once, so that it is not counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ratio = float(done.stdout.split()[-1])
    case = f"{name}; the prepared model and all that rounding holds, recorded inputs and activations too"
    return Row(row, "", "at most 1.5x", f"{ratio:.2f}x", ratio <= 1.5, case)


def peak(shape: Shape, small: Shape) -> float:
    """What :func:`memory` measures, after rounding a small model, which loads libraries and buffers."""
    _quantize(small)
    ratios: list[float] = []
    plain = Rounder.round

    def watched(self: Rounder, prepared: Any, *args: Any) -> Any:
        size = sum(p.nbytes for p in prepared.parameters())
        before = _resident()
        with _highest() as seen:
            report = plain(self, prepared, *args)
        ratios.append(1 + (max(seen) - before) / size)
        return report

    Rounder.round = watched  # type: ignore[method-assign, assignment]
    try:
        _quantize(shape)
    finally:
        Rounder.round = plain  # type: ignore[method-assign]
    return ratios[0]


def startup() -> list[Row]:
    """CPU seconds, which a busy machine changes less than those of the clock."""
    imports = [float(_python(_IMPORT)) for _ in range(_TIMES)]
    helps = []
    for _ in range(_TIMES):
        before = sum(os.times()[2:4])
        _python(_HELP)
        helps.append(sum(os.times()[2:4]) - before)
    found = ("`import qaware` beyond torch", imports, 0.2), ("`qaware --help`", helps, 0.5)
    return [
        Row(
            row, "", f"at most {most} s", f"{statistics.median(s):.3f} s", statistics.median(s) <= most, "CPU"
        )
        for row, s, most in found
    ]


def _quantize(shape: Shape) -> None:
    data = texts(shape)
    qaware.quantize(language_model(shape), recipe("gptq"), calibration=data, calibration_batches=len(data))


@contextmanager
def _highest() -> Iterator[list[int]]:
    """Inside, the resident memory is looked at every few milliseconds."""
    seen, over = [_resident()], threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            seen.append(_resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _resident() -> int:
    """Bytes of this process in memory, files aside."""
    lines = _STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _each(call: Callable[[Tensor], Any], inputs: Iterable[Tensor]) -> None:
    """Of each input; no logits are kept, as asking for new memory takes as long as a small model."""
    for ids in inputs:
        call(ids)


def _timed(function: Callable[[], Any], count: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        function()
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
