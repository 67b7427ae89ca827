"""Rounding to a registered set of levels (:mod:`qaware.level_plugins`), which are not evenly spaced.

In float32 whatever the weight is in: which of two levels is nearer is then one answer, in training as at
convert. The gradient is that of learned step sizes (Esser et al. 2020, arXiv:1902.08153, equation 3) with a
straight-through estimator, by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaware.engines.straight_through import pass_through

Levels = tuple[int, ...]
"""Integers, increasing."""


def fake_quantize_to(x: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """``x`` (rows, width) on the levels times ``scale`` (rows, blocks); the shape and dtype of ``x``."""
    steps = _steps(x, scale)
    inside = steps.clamp(levels[0], levels[-1])
    integers = pass_through(inside, _nearest(steps.detach(), levels))
    return (integers * scale.unsqueeze(-1)).reshape(x.shape).to(x.dtype)


def quantize_to(x: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """The integers of :func:`fake_quantize_to`, int8 (rows, width)."""
    return _nearest(_steps(x, scale), levels).to(torch.int8).reshape(x.shape)


def widest_scale(x: Tensor, block: int, levels: Levels) -> Tensor:
    """The smallest scale with which no value of ``x`` (rows, width) is beyond the levels, float32 (rows,
    width / block)."""
    blocks = x.detach().float().reshape(len(x), -1, block)
    return torch.maximum(blocks.amax(-1) / levels[-1], blocks.amin(-1) / levels[0])


def half_gap(x: Tensor, hard: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Half the distance from the level of each weight to the next one on the side where the weight is;
    float32 (rows, blocks, weights of a block), 0 beyond the outermost levels.

    Args:
        x: (rows, width).
        hard: ``x`` on its levels.
        scale: (rows, blocks).
        levels: the integers.
    """
    held = _steps(hard, scale).round()
    above = _beside(held, levels, (*levels[1:], levels[-1]))
    below = _beside(held, levels, (levels[0], *levels[:-1]))
    beside = torch.where(_steps(x, scale) > held, above, below)
    return (beside - held).abs() * scale.float().abs().unsqueeze(-1) / 2


def _beside(held: Tensor, levels: Levels, others: Levels) -> Tensor:
    """For each of the levels ``held`` the one of ``others`` at its place, float32."""
    pairs = dict(zip(levels, others, strict=True))
    table = [float(pairs.get(value, 0)) for value in range(levels[0], levels[-1] + 1)]
    return _looked_up(torch.tensor(table, device=held.device), held - levels[0])


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` in units of its scale, float32 (rows, blocks, weights of a block)."""
    return x.float().reshape(*scale.shape, -1) * (1.0 / scale.float()).unsqueeze(-1)


def _nearest(steps: Tensor, levels: Levels) -> Tensor:
    """The integer next to each value, as float32; what is half between two falls to the smaller one."""
    low, high = 2 * levels[0], 2 * levels[-1]
    # Middles are halves, so between two halves all values have one answer: a table is ten times as fast as a
    # search among the middles.
    points = torch.tensor(levels, dtype=torch.float32, device=steps.device)
    halves = torch.arange(low, high + 1, device=steps.device) / 2
    table = points[torch.bucketize(halves, (points[1:] + points[:-1]) / 2)]
    return _looked_up(table, (2 * steps).ceil_().clamp_(low, high).sub_(low))


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    """``table`` at ``places``, whole numbers in float32, in their shape; NaN at NaN."""
    table = torch.cat([table, table.new_full((1,), torch.nan)])
    places = places.nan_to_num(nan=len(table) - 1).to(torch.int32)
    return table.index_select(0, places.flatten()).view(places.shape)
