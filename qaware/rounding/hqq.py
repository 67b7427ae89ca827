"""Half-quadratic quantization: the scale that is best where few weights may be far off.

Badri & Shaji, "Half-quadratic quantization of large machine learning models" (2023,
https://mobiusml.github.io/hqq_blog/): the error is split into a sparse part and the rest, in turn with the
scale that fits the rest. They solve for a float zero point; grids here have whole ones, so it is the scale
that is solved for, as in torchao's ``HQQ_SCALE_ONLY``, whose shrinkage this uses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import _shrink_lp_op

from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.roundings import Hqq

_NORM = 0.7
_BETA = 10.0
_KAPPA = 1.01


def choose(weight: Tensor, grid: Grid, step: Hqq, moments: Moments | None) -> Chosen:
    """The scale of least p-norm (p = 0.7) of the error that was found in ``step.iterations``."""
    blocks = grid.blocks(weight)
    count = len(blocks)
    scale, zero_point = (qparam.reshape(-1, 1)[:count] for qparam in grid.qparams(weight))
    unit, beta = scale, _BETA  # errors in steps, as the split depends on their size
    best = scale, zero_point
    least = torch.full_like(scale, torch.inf)
    for _ in range(step.iterations + 1):
        rounded = grid.round(blocks, scale, zero_point)
        left = (blocks - rounded) / unit
        error = left.abs().pow(_NORM).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
        dense = blocks - _shrink_lp_op(left, beta, _NORM).nan_to_num() * unit
        scale, zero_point = _fit(dense, rounded, grid, scale, zero_point)
        beta *= _KAPPA
    scale, zero_point = (grid.unblock(qparam, weight) for qparam in best)
    return Chosen(grid.round(weight, scale, zero_point), scale, zero_point)


def _fit(
    dense: Tensor, rounded: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """The least-squares scale of the integers, and the zero point that is best with it."""
    levels = rounded / scale
    size = levels.square().sum(1, keepdim=True)
    fit = (levels * dense).sum(1, keepdim=True) / size
    fitted = grid.legal(torch.where((size > 0) & (fit > 0), fit, scale))
    if grid.scheme.symmetric:
        return fitted, zero_point
    shift = (levels - dense / fitted).mean(1, keepdim=True).round().to(torch.int32)
    return fitted, (zero_point + shift).clamp(*grid.integers)
