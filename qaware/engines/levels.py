"""The levels of a weight's grid: which integers they are rounded to, and which integers stand for them.

Stretched levels lie half a step beside the integers (ParetoQ, Liu et al. 2025, arXiv:2502.02631): a weight
is rounded as ``x / scale - 1/2`` and ships as the odd integers of half the scale, which is the same
product. Their rounding, and that to ranges of integers, is torchao's; registered sets are in
:mod:`qaware.engines.level_sets`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import _fake_quantize_affine, quantize_affine

from qaware.engines.level_sets import Levels, fake_quantize_to, half_gap, quantize_to, widest_scale
from qaware.engines.straight_through import round_straight_through
from qaware.scheme import Scheme

_TERNARY_THRESHOLD = 0.7
_LARGEST_SHRINK, _SMALLEST_SHRINK, _SHRINKS = 1.2, 0.3, 37


def rounding_range(scheme: Scheme, narrow: bool) -> tuple[int, int]:
    """Smallest and largest integer that a weight is rounded to; for stretched levels those below the levels.

    Args:
        scheme: the weight's.
        narrow: leave out the smallest integer of a symmetric weight.
    """
    if scheme.is_stretched:
        return -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    lowest, highest = scheme.range
    narrows = narrow and scheme.symmetric and scheme.bits > 1 and scheme.level_set is None
    return (-highest if narrows else lowest), highest


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, integers: tuple[int, int]
) -> Tensor:
    """``x`` on its levels, with the gradients of a straight-through estimator to ``x`` and of Esser et al.
    2020 (arXiv:1902.08153, equation 3) to ``scale``, where that or ``zero_point`` is trained.

    Args:
        x: (rows, width).
        scale: (rows, blocks).
        zero_point: the shape of ``scale``.
        scheme: the weight's.
        integers: see :func:`rounding_range`.

    Returns:
        The shape and dtype of ``x``.
    """
    if scheme.level_set is not None:
        return fake_quantize_to(x, scale, scheme.level_set)
    trained = scale.requires_grad or zero_point.requires_grad
    if not scheme.is_stretched and not trained:
        return round_straight_through(x, scale, None if scheme.symmetric else zero_point, *integers)
    if not scheme.is_stretched:
        values: Tensor = _fake_quantize_affine(x, _block(x, scale), scale, zero_point, torch.int32, *integers)
        return values
    steps = _below(x, scale)
    unit = torch.ones((), dtype=steps.dtype, device=x.device)
    below = _fake_quantize_affine(
        steps, tuple(steps.shape), unit, torch.zeros_like(unit), torch.int32, *integers
    )
    stretched: Tensor = ((below + 0.5) * scale.unsqueeze(-1)).view(x.shape).to(x.dtype)
    return stretched


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, integers: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The integers that ship, int8 (rows, width), and their scale, float32 (rows, blocks): by the
    arithmetic of :func:`fake_quantize`, whose arguments these are."""
    if scheme.level_set is not None:
        return quantize_to(x, scale, scheme.level_set), scale.float()
    if not scheme.is_stretched:
        data = quantize_affine(x, _block(x, scale), scale, zero_point, torch.int8, *integers)
        return data, scale.float()
    steps = _below(x, scale)
    unit = torch.ones((), dtype=steps.dtype, device=x.device)
    below = quantize_affine(steps, tuple(steps.shape), unit, torch.zeros_like(unit), torch.int8, *integers)
    return (2 * below + 1).view(x.shape), scale.float() / 2


def own_scale(x: Tensor, scheme: Scheme) -> Tensor:
    """A scale for levels that are not all of a width, (rows, blocks) in the dtype of ``x``: the largest
    absolute value fits only where there are many levels.

    Ternary: the mean of what is above 0.7 times the mean absolute value (ternary weight networks, Li et al.
    2016, arXiv:1605.04711). Stretched: the mean absolute value is the level of 1 bit; with more the
    outermost levels are half a step inside of the largest value, as in ParetoQ. Registered: the outermost
    levels are on the outermost values.
    """
    if scheme.level_set is not None:
        return widest_scale(x, scheme.block(x.shape[1]), scheme.level_set)
    blocks = x.detach().abs().reshape(len(x), -1, scheme.block(x.shape[1]))
    if scheme.levels == "ternary":
        large = blocks > _TERNARY_THRESHOLD * blocks.mean(-1, keepdim=True)
        mean: Tensor = (blocks * large).sum(-1) / large.sum(-1).clamp(min=1)
        return mean
    if scheme.bits == 1:
        return 2 * blocks.mean(-1)
    return blocks.amax(-1) * 0.5 ** (scheme.bits - 1)


def shrink(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, integers: tuple[int, int]) -> Tensor:
    """The multiple of ``scale``, from 0.3 to 1.2, whose rounding of ``x`` has the smallest squared
    error in each block (in the whole weight for ``per_tensor``). Arguments as of :func:`fake_quantize`."""
    best, least = scale, torch.full(scale.shape, torch.inf, device=x.device)
    for factor in torch.linspace(_LARGEST_SHRINK, _SMALLEST_SHRINK, _SHRINKS).tolist():
        tried = (scale * factor).to(scale.dtype)
        rounded = fake_quantize(x, tried, zero_point, scheme, integers)
        error = (rounded.float() - x.float()).square().view(*scale.shape, -1).sum(-1)
        if scheme.per_tensor:
            error = error.sum().expand_as(error)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best


def soften(x: Tensor, hard: Tensor, scale: Tensor, softness: Tensor, levels: Levels | None = None) -> Tensor:
    """Rounding that is not finished: the piecewise-affine map of PARQ (Jin et al. 2025, arXiv:2503.15748)
    from ``x`` itself to ``hard``.

    A weight within ``1 - softness`` of half a step from a level is on it; the others move towards the
    nearest, and those beyond the outermost levels are on them.

    Args:
        x: (rows, width).
        hard: ``x`` on its levels; gives the gradient.
        scale: (rows, blocks), the step between two evenly spaced levels.
        softness: scalar above 0; 1 leaves ``x`` as it is.
        levels: those of a registered set.
    """
    half = scale.detach().float().unsqueeze(-1) / 2
    if levels is not None:
        half = half_gap(x.detach(), hard.detach(), scale.detach(), levels)
    left = (x.detach().float() - hard.detach().float()).view(*scale.shape, -1)
    moved = (half - (half - left.abs()) / softness).clamp(min=0)
    moved = torch.where(left.abs() <= half, moved, 0.0) * left.sign()
    return hard + moved.view(x.shape).to(hard.dtype)


def _block(x: Tensor, scale: Tensor) -> tuple[int, int]:
    return 1, x.shape[1] // scale.shape[1]


def _below(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` in steps above the level half a step above zero, (rows, blocks, weights of a block)."""
    return x.reshape(*scale.shape, -1) * (1.0 / scale).unsqueeze(-1) - 0.5
