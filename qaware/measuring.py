"""An exported file on its own runtime: does it compute what the converted model computes, and how good is it.

The runtime is a child process, so a thread can wait for it while the main thread exports to the next runtime.
Torch's tracing is not made for threads: whatever runs a torch module is done before, in the main thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Exporter, Tolerance
from qaware.exporters.decode import in_steps
from qaware.exporters.isolated import IsolatedRunner
from qaware.metrics.remembered import Remembered
from qaware.metrics.score import Score
from qaware.parity import Parity, compare
from qaware.parity_levels import DEFAULT
from qaware.tasks import Task


@dataclass(frozen=True)
class Measured:
    """What came of one artifact."""

    artifact: Artifact
    parity: Parity
    score: Score | None


@dataclass(frozen=True)
class Measurement:
    """Parity and score of one artifact, ready to be taken in another thread."""

    exporter: Exporter
    artifact: Artifact
    quantized: QuantizedModel
    task: Task
    float_model: Remembered | None = None
    """For KL and top-1 agreement."""
    level: str = DEFAULT
    """How close is close enough; see :mod:`qaware.parity_levels`."""
    expected: Remembered = field(init=False)

    def __post_init__(self) -> None:
        """Compute what the converted model gives."""
        module = self.task.signature.wrap(self.exporter.reference(self.quantized)).eval()
        expected = Remembered(torch.no_grad()(module))
        for inputs in self.task.parity_inputs:
            expected(*inputs)
        object.__setattr__(self, "expected", expected)

    @property
    def needs_torch(self) -> bool:
        """Whether logits of a torch model are still to be computed, because there are too many to be kept."""
        return self.expected.overflowed or (self.float_model is not None and self.float_model.overflowed)

    def take(self) -> Measured:
        """Load the artifact, compare and score it.

        Raises:
            ParityError: it computes something else, at once or step by step.
            QawareError: it does not load, or its runtime reports an error or dies.
        """
        with IsolatedRunner(self.artifact) as runner:
            parity = self._compare(runner, self.task.parity_inputs)
            parity.require(self.artifact.path.name, self._tolerance)
            if runner.length:
                steps = self._compare(in_steps(runner), self.task.parity_inputs[:1])
                steps.require(f"{self.artifact.path.name}, step by step,", self._tolerance)
            score = self.task.score(runner, self.float_model)
        looser = parity.looser(self._tolerance)
        notes = (*self.artifact.notes, *([looser] if looser else []))
        return Measured(self.artifact.update(parity=parity.to_dict(), notes=notes), parity, score)

    def _compare(self, runner: Callable[..., Tensor], inputs: Sequence[tuple[Tensor, ...]]) -> Parity:
        return compare(runner, self.expected, inputs, self.quantized.outputs.values(), self.level)

    @property
    def _tolerance(self) -> Tolerance:
        return self.exporter.tolerance_for(self.quantized.plan)


class Beside:
    """Runs one measurement at a time beside the main thread, where there is a core for it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._alone = len(_cores()) < 2

    def start(self, make: Callable[[], Measurement]) -> Future[Measured]:
        """The measurement that ``make`` gives, under way; an error of either is the future's."""
        found: Future[Measured] = Future()
        try:
            measurement = make()
        except QawareError as error:
            found.set_exception(error)
            return found
        found = self._pool.submit(measurement.take)
        if self._alone or measurement.needs_torch:
            found.exception()
        return found

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _cores() -> Sequence[int] | set[int]:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return affinity(0) if affinity else range(os.cpu_count() or 1)
