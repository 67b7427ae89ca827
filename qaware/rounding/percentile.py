"""Round to nearest on the scale of a percentile of the absolute values, so that a few far ones are
clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.roundings import Percentile


def choose(weight: Tensor, grid: Grid, step: Percentile, moments: Moments | None) -> Chosen:
    """The range of ``step.share`` of the weights of a block; with zero points it loses as many at either
    end."""
    blocks = grid.blocks(weight)
    low, high = grid.integers
    if grid.scheme.symmetric:
        scale = grid.legal(2 * _quantile(blocks.abs(), step.share) / (high - low))
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        beyond = (1 - step.share) / 2
        least, most = _quantile(blocks, beyond).clamp(max=0), _quantile(blocks, 1 - beyond).clamp(min=0)
        scale = grid.legal((most - least) / (high - low))
        zero_point = (low - (least / scale).round()).clamp(low, high).to(torch.int32)
    scale, zero_point = grid.unblock(scale, weight), grid.unblock(zero_point, weight)
    return Chosen(grid.round(weight, scale, zero_point), scale, zero_point)


def _quantile(x: Tensor, share: float) -> Tensor:
    """(rows, 1), linear between neighbours; torch.quantile takes no more than 16 million values."""
    place = share * (x.shape[1] - 1)
    below = int(place)
    ordered = x.sort(dim=1).values
    above = min(below + 1, x.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below).unsqueeze(1)
