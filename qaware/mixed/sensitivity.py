"""What quantizing each layer alone costs, in nats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qaware.errors import QawareError
from qaware.mixed.estimate import Estimates, rank_correlation
from qaware.mixed.trial import Cost, Source, Trials
from qaware.mixed.weights import StoredWeight, stored_weights
from qaware.pipeline import Progress, no_progress
from qaware.plan import Plan
from qaware.tasks import Task

METHODS = ("exact", "estimate", "both")


@dataclass(frozen=True)
class LayerSensitivity:
    """One stored weight. None is what was not measured."""

    layers: tuple[str, ...]
    """Module names; several where layers are tied."""
    scheme: str
    numel: int
    bytes: int
    """Packed, under the scheme."""
    exact: Cost | None
    """Measured with this layer alone quantized."""
    estimate: float | None
    """Nats, from squared gradients; see :mod:`qaware.mixed.estimate`."""

    @property
    def label(self) -> str:
        """For tables: the first layer, and those that are tied to it."""
        return " = ".join(self.layers)


@dataclass(frozen=True)
class Sensitivity:
    """All layers, the one that costs most first."""

    recipe: str
    hash: str
    layers: tuple[LayerSensitivity, ...]
    together: Cost | None
    """All of them quantized at once; more than their sum where errors add up to worse ones."""
    rank_correlation: float | None
    """Spearman's, of the estimate and the measured KL, which has less noise than the difference in nats; None
    unless both were asked for."""
    windows: int
    float_nats: float
    protocol: dict[str, Any]
    """Of the windows that were scored."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: an infinite interval is None."""
        data = dataclasses.asdict(self)
        for cost in (data["together"], *(layer["exact"] for layer in data["layers"])):
            if cost is not None and not math.isfinite(cost["ci95"]):
                cost["ci95"] = None
        return data


def measure(
    model: nn.Module,
    plan: Plan,
    task: Task,
    method: str = "exact",
    source: Source | None = None,
    progress: Progress = no_progress,
) -> Sensitivity:
    """Rank the layers of ``plan``.

    Args:
        model: float; changed while it is measured, afterwards as before.
        plan: made for it.
        task: what is scored.
        method: ``exact``, each layer quantized alone and scored; ``estimate``, from gradients; ``both``.
        source: how else the model is quantized.
        progress: shows a bar.

    Raises:
        QawareError: unknown method, a plan that cannot be, or a task without a score.
    """
    require_method(method)
    plan.require_possible()
    weights = stored_weights(plan)
    trials = Trials(model, plan, task, source)
    exact: list[Cost | None] = [None] * len(weights)
    estimates: list[float | None] = [None] * len(weights)
    together = None
    if method != "estimate":
        exact = list(_alone(trials, weights, progress))
        together = trials.cost({n: s for w in weights for n, s in zip(w.names, w.schemes, strict=True)})
    if method != "exact":
        with progress("Gradients", task.steps) as advance:
            fisher = Estimates(model, task, weights, advance)
        estimates = [fisher.cost(weight, weight.schemes) for weight in weights]
    layers = [_line(w, e, g) for w, e, g in zip(weights, exact, estimates, strict=True)]
    return Sensitivity(
        plan.recipe.name,
        plan.recipe.hash,
        tuple(sorted(layers, key=_worst_first)),
        together,
        _correlation(layers) if method == "both" else None,
        task.steps,
        trials.float_score.nats or 0.0,
        trials.float_score.protocol,
    )


def require_method(method: str) -> None:
    """Refuse an unknown method."""
    if method not in METHODS:
        raise QawareError(f"method: {method!r} is not one of {', '.join(METHODS)}")


def _alone(trials: Trials, weights: Sequence[StoredWeight], progress: Progress) -> list[Cost]:
    costs = []
    with progress("Layers", len(weights)) as advance:
        for weight in weights:
            costs.append(trials.cost(dict(zip(weight.names, weight.schemes, strict=True))))
            advance()
    return costs


def _line(weight: StoredWeight, exact: Cost | None, estimate: float | None) -> LayerSensitivity:
    schemes = weight.schemes
    return LayerSensitivity(
        weight.names, schemes[-1].label, weight.numel, weight.bytes(schemes), exact, estimate
    )


def _worst_first(layer: LayerSensitivity) -> float:
    return -(layer.exact.d_nats if layer.exact is not None else layer.estimate or 0.0)


def _correlation(layers: Sequence[LayerSensitivity]) -> float | None:
    pairs = [(x.exact.kl, x.estimate) for x in layers if x.exact is not None and x.estimate is not None]
    return rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
