"""The integers and scales of torch_to_nnef's Q4_0 presets.

From ``torch_to_nnef/tensor/quant/base.py`` (0.24): the largest absolute value of a group, or a quantile of
them, gets the integer of the longer side, -8 of -8 to 7, by a float16 scale below zero; a weight is
multiplied by the float16 reciprocal of that, and halves are rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.roundings import Q40

_AT_ONCE = 1 << 23
"""Weights of one call of torch.quantile, which takes no more than 16 million."""


def choose(weight: Tensor, grid: Grid, step: Q40, moments: Moments | None) -> Chosen:
    """Integers and scales as torch_to_nnef has them. Only groups of zeros, and those whose scale would be
    under 2**-15, whose reciprocal float16 has not, get a scale of 2**-15."""
    blocks = grid.blocks(weight)
    low, high = grid.integers
    scale = grid.legal((_reach(blocks.abs(), step.share) / low).half().float())
    # In float16 and float32 as there: a weight near the middle of two integers falls to the same one.
    steps = blocks * (1.0 / scale.half()) + (0.5 - low)
    integers = (steps.floor() + low).clamp(low, high)
    rounded = (integers * scale).view_as(weight)
    scale = grid.unblock(scale, weight)
    return Chosen(rounded, scale, torch.zeros_like(scale, dtype=torch.int32))


def _reach(sizes: Tensor, share: float) -> Tensor:
    """(blocks, 1) of absolute values (blocks, weights of a block)."""
    if share == 1:
        return sizes.amax(1, keepdim=True)
    parts = sizes.split(max(_AT_ONCE // sizes.shape[1], 1))
    return torch.cat([torch.quantile(part, share, dim=1, keepdim=True) for part in parts])
