"""Round one layer, some of its rows at a time: what a method holds meanwhile is many times their size, and
the head of a language model is as large as several of its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qaware.errors import QawareError
from qaware.recipe import Recipe
from qaware.rounding import rtn
from qaware.rounding.base import Chosen, fix, shipped_weight, write_rows
from qaware.rounding.bias_correction import correct_bias
from qaware.rounding.grid import Grid
from qaware.rounding.kinds import CHOOSERS, chooser_of
from qaware.rounding.moments import Moments
from qaware.rounding.report import RoundedLayer
from qaware.roundings import Rtn, Step


@torch.no_grad()
def round_layer(
    name: str, layer: Any, others: Sequence[Any], recipe: Recipe, moments: Moments | None
) -> RoundedLayer:
    """Choose and write the integers of a prepared layer, in place.

    Args:
        name: of the layer, for the report.
        layer: its weight and the scales of its fake-quantizer become those that were chosen.
        others: layers with the same weight; they get its scales.
        recipe: its rounding.
        moments: of the layer's input; None for an embedding, a layer that never ran, and a step without data.

    Raises:
        QawareError: the weight has NaN or infinity.
    """
    corrects = any(step.stage == 2 for step in recipe.steps)
    before = shipped_weight(layer) if corrects else None
    grid, note = Grid(layer.weight_fake_quantizer), ""
    errors = _Errors(grid, moments)
    qparams: list[tuple[Tensor, Tensor]] = []
    step = next(step for step in recipe.steps if step.stage == 1)
    for rows in _parts(layer, grid, step):
        weight = shipped_weight(layer, rows)
        if not bool(weight.isfinite().all()):
            what = name or type(layer).__name__
            raise QawareError(f"{what}: its weight has NaN or infinity; give a model without")
        chosen = chooser_of(step.name)(weight, grid, step, errors.moments)
        errors.add(weight, chosen)
        write_rows(layer, rows, chosen.weight)
        qparams.append((chosen.scale, chosen.zero_point))
        note = chosen.note
    scale, zero_point = (torch.cat(parts) for parts in zip(*qparams, strict=True))
    for each in (layer, *others):
        fix(each, scale, zero_point)
    if before is not None:
        said = correct_bias(layer, before, shipped_weight(layer), moments)
        note = "; ".join(text for text in (note, said) if text)
    return RoundedLayer(name, recipe.rounding_label, *errors.shares, note=note)


def _parts(layer: Any, grid: Grid, step: Step) -> Iterator[slice]:
    """Rows that may be rounded without the others."""
    count = len(layer.weight)
    # A user's function is promised the whole weight; rows of one group have its own moments, and a batch norm
    # is folded into all rows at once.
    apart = step.name in CHOOSERS and isinstance(layer, (nn.Linear, nn.Embedding))
    size = grid.rows_at_once(layer.weight) if apart and not getattr(layer, "norm", ()) else count
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class _Errors:
    """Squared errors, as shares: of the output where the input is known, else of the weight."""

    def __init__(self, grid: Grid, moments: Moments | None) -> None:
        self.grid = grid
        self.moments = moments if moments is not None and moments.seen else None
        self.whole = self.left = self.rtn_left = 0.0

    def add(self, weight: Tensor, chosen: Chosen) -> None:
        """Of some rows, and of rounding them to nearest."""
        target = weight if chosen.target is None else chosen.target
        self.whole += self._square(target)
        self.left += self._square(chosen.weight - target)
        nearest = rtn.choose(target, self.grid, Rtn(), None).weight
        self.rtn_left += self._square(nearest.sub_(target))

    @property
    def shares(self) -> tuple[float, float]:
        """That of what was chosen, and that of rounding to nearest."""
        return (self.left / self.whole, self.rtn_left / self.whole) if self.whole > 0 else (0.0, 0.0)

    def _square(self, x: Tensor) -> float:
        if self.moments is None:
            return float(x.square().sum())
        rows = x.view(self.moments.groups, -1, x.shape[1])
        return float(((rows @ self.moments.hessian) * rows).sum())
