"""Round to nearest."""

from __future__ import annotations

from torch import Tensor

from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.roundings import Rtn


def choose(weight: Tensor, grid: Grid, step: Rtn, moments: Moments | None) -> Chosen:
    """The nearest values on the scale of the largest absolute value, or, with zero points, on the whole range
    from the smallest to the largest."""
    scale, zero_point = grid.qparams(weight)
    return Chosen(grid.round(weight, scale, zero_point), scale, zero_point)
