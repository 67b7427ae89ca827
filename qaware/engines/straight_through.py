"""Rounding to a grid as one step of autograd, with the gradient of a straight-through estimator.

torchao's ``_fake_quantize_affine`` is a chain of nine functions, each with a result that autograd keeps or a
pass over memory in the backward pass. Here the same arithmetic runs in place, in the same order, so the
values are the same. The gradient passes where a value was not clipped (Bengio et al. 2013,
arXiv:1308.3432) and is the one that arrives: the chain multiplies it by the scale and by its reciprocal,
which moves its last bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, highest: int
    ) -> Tensor:
        steps = _steps(x, scale, zero_point)
        if ctx.needs_input_grad[0]:
            # Half as wide as the weight, and more than it can hold is clipped anyway.
            ctx.save_for_backward(steps.to(torch.float16, copy=True))
            ctx.range = lowest, highest
        return _values(steps.clamp_(lowest, highest), x, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (steps,) = ctx.saved_tensors
        lowest, highest = ctx.range
        passed = pass_inside(grads[0], steps, lowest, highest)
        return passed, None, None, None, None


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The whole numbers that ``x`` is next to, with the zero point, (blocks, values of each)."""
    blocks = x.reshape(*scale.shape, -1) if scale.dim() else x
    steps = (blocks * (1.0 / _by_block(scale))).round_()
    return steps if zero_point is None else steps.add_(_by_block(zero_point.to(x.dtype)))


def _values(steps: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """What ``steps``, which is written over, are the integers of, in the shape and dtype of ``x``."""
    values = steps.to(x.dtype)
    if zero_point is not None:
        values.sub_(_by_block(zero_point.to(x.dtype)))
    values.mul_(_by_block(scale))
    # A view of a result that nobody else has may be changed in place by who asked for it.
    return values if values.shape == x.shape else torch.ops.aten._unsafe_view(values, x.shape)


def _by_block(qparam: Tensor) -> Tensor:
    return qparam.unsqueeze(-1) if qparam.dim() else qparam


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def pass_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, bit for bit, with a gradient that is passed to ``x`` as it is."""
    passed: Tensor = _Passed.apply(x, rounded)
    return passed


class _RoundedInRange(torch.autograd.Function):
    """One scale for all values: the bounds of the integers are those of ``x`` itself, which the function
    before it keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lowest: int, highest: int, least: float) -> Tensor:
        if ctx.needs_input_grad[0]:
            step = float(scale)
            ctx.range = max((lowest - 0.5) * step, least), (highest + 0.5) * step
            ctx.save_for_backward(x)
        return (x * (1.0 / scale)).round_().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.range), None, None, None, None


class _RoundedInside(torch.autograd.Function):
    """One scale, in whose range all values are: nothing is clipped, and the gradient is the arriving one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
        return (x * (1.0 / scale)).round_().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None


def round_inside(x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
    """:func:`round_straight_through` of an ``x`` with :func:`is_one_pass`, by whose extremes a scalar
    ``scale`` and ``zero_point`` were chosen."""
    zero = int(zero_point)
    rounded: Tensor = _RoundedInside.apply(x, scale, lowest - zero, highest - zero)
    return rounded


def pass_inside(grad: Tensor, steps: Tensor, lowest: int, highest: int) -> Tensor:
    """``grad``, but zero where the whole numbers ``steps`` (float16, as many) are out of ``lowest`` to
    ``highest``. Comparisons that make booleans take several times as long on a CPU."""
    inside = steps.view(grad.shape).float()
    gated = torch.ops.aten.hardtanh_backward(grad.float(), inside, lowest - 0.5, highest + 0.5)
    return gated.to(grad.dtype)  # type: ignore[no-any-return]


@torch.no_grad()
def round_clipped(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    """:func:`round_straight_through` without a gradient, and where there would be none: int64 indices into
    the flat ``x``, increasing, of what is clipped."""
    steps = _steps(x, scale, zero_point)
    inside = steps.clamp(lowest, highest)
    clipped = steps.ne_(inside).flatten().nonzero().squeeze(1)
    return _values(inside, x, scale, zero_point), clipped


def round_straight_through(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, highest: int
) -> Tensor:
    """``x`` on the grid ``(integer - zero_point) * scale``, with a gradient to ``x`` alone.

    Args:
        x: float32, bfloat16 or float16, any shape.
        scale: floating point, one for each block of ``x``: its shape is that of ``x`` without the last
            dimension, or with the number of blocks there. A scalar is for the whole of ``x``.
        zero_point: whole numbers, the shape of ``scale``; None for zero.
        lowest: smallest integer.
        highest: largest integer.

    Returns:
        The shape and dtype of ``x``.
    """
    if not scale.dim() and is_one_pass(x):
        zero = 0 if zero_point is None else int(zero_point)
        in_range: Tensor = _RoundedInRange.apply(x, scale, lowest - zero, highest - zero, -math.inf)
        return in_range
    rounded: Tensor = _Rounded.apply(x, scale, zero_point, lowest, highest)
    return rounded


def is_one_pass(x: Tensor) -> bool:
    """Whether ``x`` is rounded to one scale by a function of its own, in float32 on a CPU."""
    return x.dtype == torch.float32 and x.is_cpu and not torch.compiler.is_compiling()


def round_rectified(x: Tensor, scale: Tensor, highest: int) -> Tensor:
    """:func:`round_straight_through` of ``relu(x)`` to the integers from 0 to ``highest`` of one ``scale``:
    who rounds to them has made negative values 0 already. For an ``x`` with :func:`is_one_pass`."""
    rounded: Tensor = _RoundedInRange.apply(x, scale, 0, highest, 0.0)
    return rounded
