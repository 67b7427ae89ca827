"""What a choice of schemes costs: quantize a model with it for as long as it takes to score it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from qaware.api import Step, quantize
from qaware.copying import deep_copy
from qaware.engines.base import QuantizedModel
from qaware.engines.choose import choose
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.metrics.remembered import Remembered
from qaware.metrics.score import Score, paired
from qaware.mixed.rules import one_by_one
from qaware.mixed.weights import assigned
from qaware.pipeline import predictor
from qaware.plan import Plan
from qaware.scheme import Scheme
from qaware.tasks import Predict, Task

_STRUCTURE = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Cost:
    """How much worse than the float model, on the same windows."""

    d_nats: float
    """Nats more, for each token or sample."""
    ci95: float
    """Half width of its paired 95% interval; infinite with one window."""
    kl: float
    """Mean KL(float || this) in nats."""


@dataclass(frozen=True)
class Source:
    """How a model is quantized apart from its schemes: the arguments of :func:`qaware.quantize`."""

    calibration: Any = None
    """A loader or list of batches, or a function that gives it, called when a recipe needs it."""
    calibration_batches: int | None = None
    step: Step | None = None
    runtimes: Sequence[str] = ()
    engine: str = "auto"


class Trials:
    """A float model that is quantized again and again; after each trial it is float as before."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        task: Task,
        source: Source | None = None,
        reference: Predict | None = None,
    ) -> None:
        """
        Args:
            model: float; it runs in evaluation mode, and is changed while a trial runs.
            plan: of the recipe that gives the rounding.
            task: what is scored.
            source: how else it is quantized.
            reference: the float model that stays; None to make a copy.

        Raises:
            QawareError: the task has no score.
        """
        self.model, self.plan, self.task = model.eval(), plan, task
        self.source = source or Source()
        self.reference = reference or Remembered(predictor(deep_copy(model).eval(), task))
        score = task.score(self.reference)
        if score is None:
            raise QawareError(
                "data: neither tokens nor labels were found in the validation data, so nothing can be scored"
            )
        self.float_score: Score = score

    def on(self, task: Task) -> Trials:
        """The same on another part of the data."""
        return Trials(self.model, self.plan, task, self.source, self.reference)

    def cost(self, schemes: Mapping[str, Scheme]) -> Cost:
        """Of the model with these schemes by module name, everything else in float."""
        return self.compare(self.score(schemes))

    def compare(self, score: Score) -> Cost:
        """A score of the same task against the float model's."""
        difference, width = paired(score, self.float_score)
        return Cost(difference, width, score.kl if score.kl is not None else math.nan)

    def score(self, schemes: Mapping[str, Scheme]) -> Score:
        """Of the model with these schemes; what a converted model scores, bit for bit."""
        plan = assigned(self.plan, schemes)
        with self._quantized(plan) as module:
            score = self.task.score(predictor(module, self.task), self.reference)
        assert score is not None
        return score

    @contextmanager
    def _quantized(self, plan: Plan) -> Iterator[nn.Module]:
        """The model under ``plan``: itself where a layer can be prepared and restored, else a copy."""
        source, recipe = self.source, plan.recipe
        engine = choose(plan, self.model, source.runtimes, source.engine).engine
        if engine == "modules" and not plan.needs_calibration and recipe.rounding == "rtn":
            with _rewound(self.model):
                yield ModulesEngine().prepare(self.model, plan)
            return
        yield self._converted(plan).module

    def convert(self, schemes: Mapping[str, Scheme]) -> QuantizedModel:
        """A converted copy with these schemes."""
        return self._converted(assigned(self.plan, schemes))

    def _converted(self, plan: Plan) -> QuantizedModel:
        source = self.source
        needed = plan.needs_calibration or any(step.needs_data for step in plan.recipe.steps)
        return quantize(
            self.model,
            one_by_one(plan),
            source.calibration() if needed and callable(source.calibration) else source.calibration,
            source.calibration_batches,
            source.step,
            source.runtimes,
            source.engine,
        )


@contextmanager
def _rewound(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the class, attributes and parts that it had before."""
    kept = [
        (m, type(m), dict(vars(m)), {key: dict(vars(m)[key]) for key in _STRUCTURE}) for m in model.modules()
    ]
    try:
        yield
    finally:
        for module, cls, attributes, structure in kept:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for key, parts in structure.items():
                vars(module)[key].clear()
                vars(module)[key].update(parts)
