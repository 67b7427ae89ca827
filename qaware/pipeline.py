"""From a prepared model to scored artifacts: the one implementation, whichever door it is entered by."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qaware.bisect_layers import Search, first_difference
from qaware.engines.base import QuantizedModel
from qaware.engines.choose import engine_for
from qaware.errors import ParityError, QawareError
from qaware.exporters.artifact import Artifact, sidecar_path
from qaware.exporters.base import Exporter, first_line
from qaware.exporters.isolated import IsolatedRunner
from qaware.files import replace, write_json
from qaware.layers import LayerReport, float_twin, layer_report
from qaware.measuring import Beside, Measured, Measurement
from qaware.metrics.remembered import Remembered
from qaware.metrics.score import Score
from qaware.parity import Parity
from qaware.parity_levels import DEFAULT
from qaware.plan import Plan
from qaware.report.layers import write_layers
from qaware.report.ledger import Comparison, Ledger, Row
from qaware.rounding.report import RoundingReport
from qaware.tasks import Predict, Task

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Opens a bar of ``total`` steps and yields the function that advances it."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Callable[[], None]]: ...


@contextlib.contextmanager
def no_progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """For use without a Trainer."""
    yield lambda: None


@dataclass
class QuantizationResult:
    """What quantizing gave: the model, what was done to it, what it scores, and the files."""

    model: QuantizedModel
    plan: Plan
    rows: list[Row] = field(default_factory=list)
    scores: dict[str, Score] = field(default_factory=dict)
    """By stage."""
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """By runtime; only files that passed the parity check."""
    parity: dict[str, Parity] = field(default_factory=dict)
    layers: LayerReport | None = None
    """What each layer computes beside the float model; on the first rank only."""
    failures: dict[str, QawareError] = field(default_factory=dict)
    """By runtime: what kept an artifact from being made or scored."""


@dataclass
class Pipeline:
    """The steps after prepare, for one model, writing a row after each."""

    ledger: Ledger
    task: Task | None
    """None: nothing can be scored or exported, only converted."""
    exporters: Sequence[Exporter]
    folder: Path
    """Where artifacts go."""
    label: str
    """The model's name in the table."""
    comparison: Comparison | None = None
    reference: Predict | None = None
    """The float model, for KL and top-1 agreement."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Kept in every sidecar."""
    progress: Progress = no_progress
    rank: int = 0
    world: int = 1
    rounding: RoundingReport | None = None
    """What rounding did, where it was not to nearest."""
    parity: str = DEFAULT
    """How close an artifact must be to the converted model; see :mod:`qaware.parity_levels`."""
    search_seconds: float = 300.0
    """How long the layer that differs is searched after a parity failure; 0: not at all."""

    _twin: nn.Module | None = None
    _reference: Remembered | None = None

    def __post_init__(self) -> None:
        """Each stage is compared with the same logits of the float model."""
        if self.reference is not None:
            self._reference = Remembered(self.reference)

    def before_rounding(self, prepared: nn.Module) -> nn.Module:
        """A copy of ``prepared`` that computes in float; its weights, which rounding writes over, are kept
        for the layer report."""
        twin = float_twin(prepared)
        self._twin = twin if self.rank == 0 else None
        return twin

    def score_module(self, label: str, stage: str, module: nn.Module, size: int) -> Score | None:
        """Score a torch module; every rank takes its share, and all get the same score."""
        if self.task is None:
            self.ledger.add(label, stage, None, size)
            return None
        with self.progress(f"Scoring {stage}", self.task.steps // self.world) as advance:
            score = self.task.score(
                predictor(module, self.task),
                self._reference if stage != "float" else None,
                on_step=advance,
                rank=self.rank,
                world=self.world,
            )
        base = self.comparison if self.comparison and self.comparison.base != label else None
        self.ledger.add(label, stage, score, size, base)
        return score

    def convert(self, prepared: nn.Module, plan: Plan) -> QuantizationResult:
        """Convert ``prepared`` in place (give a copy), score the converted model and report its layers."""
        twin = self._twin
        if twin is None and self.rank == 0:
            twin = float_twin(prepared)
        quantized = engine_for(plan).convert(prepared, plan)
        quantized.rounding, self._twin = self.rounding, None
        if self.rounding is not None and self.rank == 0:
            from qaware.report.rounding import write_rounding

            write_rounding(self.rounding, self.folder, self.label)
        result = QuantizationResult(quantized, quantized.plan)
        result.layers = self._report_layers(twin, quantized)
        del twin
        score = self.score_module(self.label, "converted", quantized.module, quantized.bytes)
        if score is not None:
            result.scores["converted"] = score
        return result

    def _report_layers(self, twin: nn.Module | None, quantized: QuantizedModel) -> LayerReport | None:
        if twin is None:
            return None
        args, kwargs = self.task.signature.arguments(self.task.example) if self.task else ((), {})
        try:
            report = layer_report(twin, quantized, *args, **kwargs)
        except Exception as error:  # a report is no reason to lose what was trained
            log.warning("%s: no layer report: %s", self.label, first_line(error))
            return None
        write_layers(report, self.folder, self.label)
        return report

    def export_all(self, result: QuantizationResult) -> None:
        """Export to each runtime, check parity, score. A failing runtime leaves the others alone.

        While a file is measured on its runtime, the next one is already made.
        """
        if self.task is None or self.rank != 0:
            return
        with Beside() as beside:
            waiting = deque[tuple[Exporter, Future[Measured]]]()
            for exporter in self.exporters:
                with self.progress(f"Exporting to {exporter.name}", 1):
                    waiting.append(
                        (exporter, beside.start(functools.partial(self._export, exporter, result)))
                    )
                while waiting and waiting[0][1].done():
                    self._record(*waiting.popleft(), result)
            while waiting:
                self._record(*waiting.popleft(), result)

    def _export(self, exporter: Exporter, result: QuantizationResult) -> Measurement:
        assert self.task is not None
        task, path = self.task, self.folder / f"{self.label.replace(' ', '-')}{exporter.suffix}"
        artifact = exporter.export(result.model, task.example, task.signature, path, self.metadata)
        return Measurement(exporter, artifact, result.model, task, self._reference, self.parity)

    def _record(self, exporter: Exporter, future: Future[Measured], result: QuantizationResult) -> None:
        """A row of what was measured, or of what went wrong."""
        name = exporter.name
        try:
            with self.progress(f"Scoring {name}", 1):
                measured = self._measured(exporter, future, result)
        except QawareError as error:
            result.failures[name] = error
            self.ledger.add(self.label, name, None, 0, failed=str(error))
            log.error("%s", error)
            return
        artifact, parity, score = measured.artifact, measured.parity, measured.score
        if looser := parity.looser(exporter.tolerance_for(result.plan)):
            log.warning("%s: %s", artifact.path.name, looser)
        more = {"artifact": artifact.path.name, "parity": parity.to_dict(), "notes": list(artifact.notes)}
        self.ledger.add(self.label, name, score, artifact.bytes, self.comparison, **more)
        result.artifacts[name], result.parity[name] = artifact, parity
        if score is not None:
            result.scores[name] = score

    def _measured(self, exporter: Exporter, future: Future[Measured], result: QuantizationResult) -> Measured:
        try:
            return future.result()
        except ParityError as error:
            path = self.folder / f"{self.label.replace(' ', '-')}{exporter.suffix}"
            for file in (path, sidecar_path(path)):
                replace(file, file.with_name(file.name + ".rejected"))
            where = self._first_difference(exporter, result.model)
            raise ParityError(f"{error}; {where}" if where else str(error)) from None

    def _first_difference(self, exporter: Exporter, quantized: QuantizedModel) -> str | None:
        task = self.task
        if task is None or not self.search_seconds:
            return None
        models = exporter, quantized, task.example, task.signature, task.parity_inputs
        with self.progress("Searching the layer that differs", 1):
            return first_difference(Search(*models, IsolatedRunner, self.folder), self.search_seconds)


def predictor(module: nn.Module, task: Task) -> Predict:
    """``module`` in evaluation mode as a function of CPU tensors, run on its own device."""
    wrapped = task.signature.wrap(module).eval()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def predict(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = wrapped(*(t.to(device) for t in tensors))
            return output.cpu()

    return predict


def save_plan(plan: Plan, path: Path) -> None:
    """The fate of every parameter as JSON."""
    rows = [
        {
            "parameter": d.parameter,
            "shape": list(d.shape),
            "role": d.role,
            "scheme": d.scheme.label if d.scheme else None,
            "reason": d.reason,
            "tied_to": d.tied_to,
        }
        for d in plan.decisions
    ]
    write_json(path, {"recipe": plan.recipe.to_dict(), "hash": plan.recipe.hash, "parameters": rows})
