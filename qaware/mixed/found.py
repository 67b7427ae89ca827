"""What a search gives."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qaware.files import write_text
from qaware.mixed.budget import Budget
from qaware.mixed.prices import Price
from qaware.mixed.trial import Cost
from qaware.recipe import Recipe


@dataclass(frozen=True)
class Point:
    """One choice for all layers."""

    bits: tuple[int, ...]
    """Of each stored weight."""
    bpw: float
    """Bits for each quantized weight, with scales and zero points; tied weights count once."""
    bytes: int
    """Of the whole model, packed."""
    predicted: float
    """Sum of what each layer costs alone: KL, or the estimate, in nats."""
    measured: Cost | None
    """All layers together, on all windows, where that was measured."""


@dataclass(frozen=True)
class Found:
    """A recipe, and what else there would have been."""

    recipe: Recipe
    point: Point
    """Of the recipe, measured."""
    held_out: tuple[float, float] | None
    """Nats lost, and the half width of their 95% interval, on the windows that the choice was not made on;
    None without any."""
    frontier: tuple[Point, ...]
    """The best choices for budgets from the smallest to the largest."""
    uniform: tuple[Point, ...]
    """One width for all layers, as far as all hold it; measured."""
    prices: tuple[tuple[tuple[str, ...], tuple[Price, ...]], ...]
    """For each stored weight its layers, and its price under each scheme."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: what is not finite is None."""
        data = {**dataclasses.asdict(self), "recipe": self.recipe.to_dict()}
        plain: dict[str, Any] = _finite(data)
        return plain

    def save(self, path: Path) -> None:
        """Write the recipe as YAML that :meth:`qaware.Recipe.load` reads; the same recipe, the same bytes.

        Raises:
            QawareError: the file cannot be written.
        """
        data = self.recipe.to_dict()
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
        write_text(path, text)


def describe(budget: Budget, seed: int, point: Point) -> str:
    """The description of a recipe that was found."""
    assert point.measured is not None
    return (
        f"Mixed precision for {budget.text}, seed {seed}: {point.bpw:.3f} bits per weight, "
        f"{point.bytes} bytes, {point.measured.d_nats:+.4f} ±{point.measured.ci95:.4f} nats against the "
        "float model"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
