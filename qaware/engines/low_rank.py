"""Gradients of low-rank factors inside a rounding, without that of the weight they are added to.

With y = x V^T, V = round(W + s B A) and the gradient passed straight through but for what is clipped, V has
the gradient V' = y'^T x - C, where C is y'^T x at the clipped places and zero elsewhere. So ``A' = s B^T V'``
and ``B' = s V' A^T`` are products through the rank, ``(B^T y'^T) x`` and ``((A x^T) y')^T``, less those of a
sparse C. With a grid that spans a weight's largest values about one place of a hundred is clipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_SPARSE = 0.05
"""With a larger share of clipped places the dense product takes less time than that of chosen places."""
_TOKENS = 128


class Factors(NamedTuple):
    """One adapter: ``scale * b @ a`` is added to a weight (rows, width)."""

    a: Tensor
    """(rank, width)"""
    b: Tensor
    """(rows, rank)"""
    scale: float


def pass_to_factors(y: Tensor, x: Tensor, clipped: Tensor, factors: list[Factors]) -> Tensor:
    """``y``, which nobody may use any more, with a gradient that goes to ``factors`` too.

    Args:
        y: (..., rows), the product of ``x`` and a rounded weight that gets no gradient.
        x: (..., width), what entered; gets its gradient by ``y``.
        clipped: int64, indices into the flat weight, increasing, of what was clipped.
        factors: of the weight.

    Returns:
        The values and the memory of ``y``.
    """
    # Under autocast the product has made such a copy of x for itself, and does not keep it.
    tensors = [tensor for factor in factors for tensor in (factor.a, factor.b)]
    scales = [factor.scale for factor in factors]
    passed: Tensor = _Passed.apply(y, x.detach().to(y.dtype), clipped, scales, *tensors)
    return passed


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, clipped: Tensor, scales: list[float], *tensors: Tensor
    ) -> Tensor:
        ctx.scales = scales
        ctx.save_for_backward(x, clipped, *tensors)
        # Its memory, but no view of it: who asked for a product may change it in place.
        unseen: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return unseen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, clipped, *tensors = ctx.saved_tensors
        grad, x = grads[0].reshape(-1, grads[0].shape[-1]), x.reshape(-1, x.shape[-1])
        gone = _at(clipped, grad, x)
        found: list[Tensor | None] = []
        for a, b, scale in zip(tensors[::2], tensors[1::2], ctx.scales, strict=True):
            to_a, to_b = _products(grad, x, gone, a.to(x.dtype), b.to(x.dtype))
            found += [(to_a * scale).to(a.dtype), (to_b * scale).to(b.dtype)]
        return grads[0], None, None, None, *found


def _products(grad: Tensor, x: Tensor, gone: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What arrives at ``a`` and ``b``, in the orders of products that are fast for a small rank."""
    if not gone.is_sparse_csr:
        return b.t() @ gone, gone @ a.t()
    to_a = (b.t() @ grad.t()) @ x - (gone.t() @ b.to(gone.dtype)).t()
    to_b = ((a @ x.t()) @ grad).t() - gone @ a.t().to(gone.dtype)
    return to_a, to_b


def _at(clipped: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """``grad^T x`` (rows, width): that of the clipped places as a sparse matrix, or, where they are many,
    all but them as a dense one."""
    rows, width = grad.shape[1], x.shape[1]
    if len(clipped) > _SPARSE * rows * width:
        return (grad.t() @ x).flatten().index_fill_(0, clipped, 0).view(rows, width)
    found = _nothing_at(clipped, rows, width)
    # In parts that stay, with the transposed copies that are made of them, in a processor's cache.
    size = _TOKENS if x.is_cpu else max(len(x), 1)
    for some_grad, some_x in zip(grad.split(size), x.split(size), strict=True):
        found = torch.sparse.sampled_addmm(found, some_grad.t().float(), some_x.float())
    return found


def _nothing_at(places: Tensor, rows: int, width: int) -> Tensor:
    """A sparse matrix of zeros, float32 (rows, width), that has the ``places``."""
    starts = torch.arange(rows + 1, device=places.device) * width
    zeros = torch.zeros(len(places), device=places.device)
    at = torch.searchsorted(places, starts), places % width
    return torch.sparse_csr_tensor(*at, zeros, (rows, width), check_invariants=False)
