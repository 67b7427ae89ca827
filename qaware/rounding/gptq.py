"""GPTQ: columns are rounded one after the other, and the columns to come make up for the error.

Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers" (ICLR
2023, arXiv:2210.17323): the Cholesky factor of the inverse Hessian, errors passed on in blocks of columns,
columns with large inputs first (``act_order``), the Hessian damped. What is matched is the float model's
output, so that a layer makes up for the rounding of those before it too: Zhang et al., "Qronos: correcting
the past by shaping the future" (2025, arXiv:2505.11695), and Li et al., "GPTAQ" (ICML 2025,
arXiv:2504.02692).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qaware.rounding import mse
from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.rounding.polish import Problem, polish
from qaware.roundings import Gptq, Mse

_MORE = 10.0
_LEAST_DAMPING = 1e-4
_TRIES = 5
_ROWS = 256


def choose(weight: Tensor, grid: Grid, step: Gptq, moments: Moments | None) -> Chosen:
    """Integers whose errors make up for each other on the calibration data; without any, those of ``mse``."""
    if moments is None:
        return _nearest(weight, grid, step, None, "mse, as no input was seen")
    if step not in moments.worked_out:
        moments.worked_out[step] = _factor(moments.hessian, step)
    found = moments.worked_out[step]
    if found is None:
        return _nearest(weight, grid, step, moments, "mse, as its Hessian has no inverse")
    factor, order, damping = found
    target = _target(weight, moments, factor, order) if step.correct else weight
    work = _Work(target, grid, step, mse.importance(weight, moments), factor, order)
    problem = Problem(target, moments.hessian, _ridge(moments.hessian, damping), grid)
    rounded, scale = polish(problem, work.run(), work.scale, work.zero_point, step.polish)
    note = "" if damping == step.damping else f"damping {damping:g}, as its Hessian is singular"
    return Chosen(rounded, scale, work.zero_point, note, target)


def _nearest(weight: Tensor, grid: Grid, step: Gptq, moments: Moments | None, why: str) -> Chosen:
    return dataclasses.replace(mse.choose(weight, grid, Mse(signed=step.signed), moments), note=why)


def _factor(hessian: Tensor, step: Gptq) -> tuple[Tensor, Tensor, float] | None:
    """The upper Cholesky factor of the inverse of the damped Hessian, float32 (groups, width, width), the
    order of its columns (groups, width), and the damping that it took."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    columns = torch.arange(hessian.shape[1], device=hessian.device).expand(diagonal.shape)
    order = diagonal.argsort(dim=1, descending=True, stable=True) if step.act_order else columns
    damping = step.damping
    for _ in range(_TRIES):
        # The factor of a matrix that is read backwards is, inverted and read backwards, that of its inverse.
        inverse = _inverse_factor(hessian, order.flip(1), _ridge(hessian, damping))
        if inverse is not None:
            return inverse.flip(1, 2), order, damping
        damping = max(damping, _LEAST_DAMPING) * _MORE
    return None


def _inverse_factor(hessian: Tensor, order: Tensor, ridge: Tensor) -> Tensor | None:
    """The inverse of the lower Cholesky factor of ``hessian`` with its rows and columns in ``order`` and
    ``ridge`` on its diagonal, where there is one. Nothing that GPTQ holds is larger: here are two of it."""
    lower = _ordered(hessian, order).mT  # the order that LAPACK works in without a copy
    lower.diagonal(dim1=1, dim2=2).add_(ridge)
    failed = torch.empty(len(lower), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if bool(failed.any()):
        return None
    inverse = torch.zeros_like(lower)
    inverse.diagonal(dim1=1, dim2=2).fill_(1)
    for triangle, solution in zip(lower, inverse, strict=True):  # in place for single matrices only
        torch.linalg.solve_triangular(triangle, solution, upper=False, out=solution)
    return inverse if bool(inverse.sum().isfinite()) else None


def _ordered(hessian: Tensor, order: Tensor) -> Tensor:
    """``hessian`` with its rows and columns in ``order``, some rows at a time."""
    ordered = torch.empty_like(hessian)
    for group, places in enumerate(order):
        for rows, found in zip(places.split(_ROWS), ordered[group].split(_ROWS), strict=True):
            found.copy_(hessian[group][rows][:, places])
    return ordered


def _ridge(hessian: Tensor, damping: float) -> Tensor:
    """What damping adds to the diagonal, (groups, 1): a share of its mean, or 1 where nothing but zeros was
    seen."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    return torch.where(mean > 0, damping * mean, 1.0)


def _target(weight: Tensor, moments: Moments, factor: Tensor, order: Tensor) -> Tensor:
    """The real weight whose output from what enters is nearest to the float model's, ``weight`` itself where
    that is not known; float32 (rows, width). The others are what :func:`_factor` gives."""
    if moments.drift is None:
        return weight
    # weight @ E[y x^T] @ inverse of the Hessian E[x x^T], with y = x + (y - x).
    pull = weight.view(moments.groups, -1, weight.shape[1]) @ moments.drift
    columns = order.unsqueeze(1).expand_as(pull)
    moved = pull.gather(2, columns) @ factor.mT @ factor
    return weight + torch.empty_like(moved).scatter_(2, columns, moved).view_as(weight)


class _Work:
    """One weight on its way, turned, so that a column of it is one piece of memory."""

    def __init__(
        self, target: Tensor, grid: Grid, step: Gptq, counts: Tensor, factor: Tensor, order: Tensor
    ) -> None:
        """
        Args:
            target: float32 (rows, width), what the rounded weight should compute.
            grid: its grid.
            step: the options.
            counts: how much the square of each weight's error counts, the shape of ``target``.
            factor: see :func:`_factor`.
            order: of the columns, as there.
        """
        self.grid, self.step, self.counts = grid, step, counts
        self.factor, self.order = factor, order
        self.size = grid.scheme.block(target.shape[1])
        self.rescales = self.size < target.shape[1] and not step.act_order
        if self.rescales:  # a group's are chosen when its turn comes
            self.scale = target.new_empty(len(target), target.shape[1] // self.size)
            self.zero_point = torch.empty_like(self.scale, dtype=torch.int32)
        else:
            self.scale, self.zero_point = self._qparams(target, counts)
        self.places = order.unsqueeze(2).expand(-1, -1, len(target) // len(order))
        self.left = target.view(len(order), -1, target.shape[1]).mT.gather(1, self.places)
        self.errors = torch.empty_like(self.left)

    def run(self) -> Tensor:
        """Round all columns; the weight as it is then, float32 (rows, width)."""
        width = self.left.shape[1]
        # Whole groups, so that all columns of a group are up to date when the first of them is reached.
        size = -(-self.step.block // self.size) * self.size if self.rescales else self.step.block
        for start in range(0, width, size):
            end = min(start + size, width)
            for first in range(start, end, self.size if self.rescales else size):
                last = min(first + self.size, end) if self.rescales else end
                self._pass_on(slice(start, first), slice(first, last))
                self._round(first, last)
            self._pass_on(slice(start, end), slice(end, width))
        rounded = torch.empty_like(self.left).scatter_(1, self.places, self.left)
        return rounded.mT.reshape(-1, width)

    def _pass_on(self, done: slice, later: slice) -> None:
        """Errors of the columns that are ``done``, which ``later`` ones make up for."""
        self.left[:, later].baddbmm_(self.factor[:, done, later].mT, self.errors[:, done], alpha=-1)

    def _round(self, first: int, last: int) -> None:
        """These columns one by one; they are up to date."""
        if self.rescales:
            self._rescale(first, last)
        qparams = self._qparams_of(first)
        pivots = self.factor.diagonal(dim1=1, dim2=2)
        for column in range(first, last):
            self._pass_on(slice(first, column), slice(column, column + 1))
            left = self.left[:, column]
            if self.step.act_order:
                qparams = self._qparams_of(column)
            rounded = self.grid.round(left.reshape(-1, 1), *qparams).view_as(left)
            torch.sub(left, rounded, out=self.errors[:, column]).div_(pivots[:, column : column + 1])
            left.copy_(rounded)

    def _qparams_of(self, column: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row, (rows, 1), in the block of the ``column``-th column."""
        blocks = (self.order[:, column] // self.size).repeat_interleave(self.left.shape[2]).unsqueeze(1)
        return self.scale.gather(1, blocks), self.zero_point.gather(1, blocks)

    def _rescale(self, first: int, last: int) -> None:
        """Scales for a group with the errors that it has taken over, not for the weight as it was."""
        group = self.left[:, first:last].mT.flatten(0, 1).contiguous()
        scale, zero_point = self._qparams(group, self.counts[:, first:last])
        block = slice(first // self.size, last // self.size)
        self.scale[:, block], self.zero_point[:, block] = scale, zero_point

    def _qparams(self, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        if self.step.scales == "minmax":
            scale, zero_point = self.grid.qparams(weight)
        else:
            scale, zero_point = mse.search(weight, self.grid, Mse(signed=self.step.signed), counts)
        return scale.clone(), zero_point.clone()
