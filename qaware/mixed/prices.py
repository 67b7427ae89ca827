"""What each layer costs under each of its choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qaware.mixed.estimate import Estimates
from qaware.mixed.trial import Cost, Trials
from qaware.mixed.weights import Schemes, StoredWeight
from qaware.pipeline import Progress


@dataclass(frozen=True)
class Price:
    """One layer under one scheme."""

    scheme: str
    bytes: int
    """Packed."""
    cost: float
    """Nats that are added up: the KL divergence that was measured, or the estimate."""
    measured: Cost | None


def prices_of(
    trials: Trials,
    weights: Sequence[StoredWeight],
    choices: Sequence[Sequence[Schemes]],
    method: str,
    progress: Progress,
) -> list[list[Price]]:
    """For each weight the prices of its choices.

    Args:
        trials: on the windows that the choice is made on.
        weights: stored ones.
        choices: of each.
        method: ``exact``, with each weight alone quantized, or ``estimate``.
        progress: shows a bar.
    """
    if method == "estimate":
        with progress("Gradients", trials.task.steps) as advance:
            fisher = Estimates(trials.model, trials.task, weights, advance)
        return [
            [_price(w, s, fisher.cost(w, s), None) for s in schemes]
            for w, schemes in zip(weights, choices, strict=True)
        ]
    with progress("Layers at each width", sum(map(len, choices))) as advance:
        prices: list[list[Price]] = []
        for weight, schemes in zip(weights, choices, strict=True):
            prices.append([])
            for choice in schemes:
                cost = trials.cost(dict(zip(weight.names, choice, strict=True)))
                prices[-1].append(_price(weight, choice, cost.kl, cost))
                advance()
    return prices


def _price(weight: StoredWeight, schemes: Schemes, cost: float, measured: Cost | None) -> Price:
    return Price(schemes[-1].label, weight.bytes(schemes), cost, measured)
