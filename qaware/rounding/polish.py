"""Look at every integer once more when the others are known, and fit the scales to the integers.

Coordinate descent on the squared error of a layer's output, as in Behdin et al., "QuantEase:
optimization-based quantization for language models" (2023, arXiv:2309.01885); the scales are then those of
least squares.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from qaware.rounding.grid import Grid

_BLOCK = 128
_RIDGE = 1e-6
_NUMBERS = 1 << 17
"""Of the equations for scales that are solved at once."""


@dataclass(frozen=True)
class Problem:
    """What is to be minimized: the sum over rows of ``(rounded - target) hessian (rounded - target)^T``."""

    target: Tensor
    """float32 (rows, width)."""
    hessian: Tensor
    """float32 (groups, width, width)."""
    ridge: Tensor
    """float32 (groups, 1), is added to its diagonal, which makes it positive definite."""
    grid: Grid

    def error(self, rounded: Tensor) -> Tensor:
        """Of each row, (rows, 1)."""
        left = self.grouped(rounded - self.target)
        return self.times(left).mul_(left).sum(2).view(-1, 1)

    def times(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        """``x`` (groups, rows of a group, columns) times these rows of the Hessian with its ridge."""
        product = x @ self.hessian[:, columns]
        product[:, :, columns] += x * self.ridge.unsqueeze(2)
        return product

    def grouped(self, x: Tensor) -> Tensor:
        """(groups, rows of a group, ...) of (rows, ...)."""
        return x.reshape(len(self.hessian), -1, *x.shape[1:])


def polish(
    problem: Problem, rounded: Tensor, scale: Tensor, zero_point: Tensor, times: int
) -> tuple[Tensor, Tensor]:
    """Rounded weight and scale, in no row worse than they were.

    Args:
        problem: what is minimized.
        rounded: float32 (rows, width), on the grid of ``scale`` and ``zero_point``.
        scale: float32 (rows, width / block).
        zero_point: int32, the shape of ``scale``.
        times: how often the integers are looked at, and all but the first time the scales fitted before.
    """
    for turn in range(times):
        fitted = _fitted(problem, rounded, scale) if turn else scale
        moved = (rounded.view(*scale.shape, -1) / scale.unsqueeze(-1)).mul_(fitted.unsqueeze(-1))
        tried = _sweep(problem, moved.view_as(rounded), fitted, zero_point)
        better = problem.error(tried) < problem.error(rounded)
        if problem.grid.scheme.per_tensor:  # a scale that all rows share is taken by all or none
            better = problem.error(tried).sum() < problem.error(rounded).sum()
        rounded, scale = torch.where(better, tried, rounded), torch.where(better, fitted, scale)
    return rounded, scale


def _sweep(problem: Problem, rounded: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Each column, in turn, is what is best with all others as they are."""
    pull = problem.times(problem.grouped(problem.target - rounded)).mT.contiguous()
    values = problem.grouped(rounded).mT.contiguous()  # a column of it is one piece of memory
    pivots = problem.hessian.diagonal(dim1=1, dim2=2) + problem.ridge
    size = rounded.shape[1] // scale.shape[1]
    for start in range(0, rounded.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        changes = torch.empty_like(values[:, columns])
        for index in range(changes.shape[1]):
            column = start + index
            seen = problem.hessian[:, column : column + 1, start:column] @ changes[:, :index]
            best = (pull[:, column] - seen.squeeze(1)).div_(pivots[:, column : column + 1])
            best += values[:, column]
            qparams = (qparam[:, column // size].unsqueeze(1) for qparam in (scale, zero_point))
            found = problem.grid.round(best.view(-1, 1), *qparams).view_as(best)
            torch.sub(found, values[:, column], out=changes[:, index])
            values[:, column] = found
        pull.baddbmm_(problem.hessian[:, :, columns], changes, alpha=-1)
        pull[:, columns] -= changes * problem.ridge.unsqueeze(2)
    return values.mT.reshape(rounded.shape)


def _fitted(problem: Problem, rounded: Tensor, scale: Tensor) -> Tensor:
    """The legal scales nearest to those of least squares for the integers; none changes its sign."""
    count = max(_NUMBERS // scale.shape[1] ** 2, 1)
    if len(problem.hessian) > 1 or problem.grid.scheme.per_tensor or count >= len(scale):
        return _fit(problem, rounded, scale)
    rows = zip(problem.target.split(count), rounded.split(count), scale.split(count), strict=True)
    return torch.cat([_fit(dataclasses.replace(problem, target=t), r, s) for t, r, s in rows])


def _fit(problem: Problem, rounded: Tensor, scale: Tensor) -> Tensor:
    """:func:`_fitted` for some rows, each with a system of equations for its blocks."""
    levels = rounded.view(*scale.shape, -1) / scale.unsqueeze(-1)
    matrix = scale.new_empty(*scale.shape, scale.shape[1], dtype=torch.float64)
    right = torch.empty_like(scale, dtype=torch.float64)
    for block in range(scale.shape[1]):
        part = slice(block * levels.shape[2], (block + 1) * levels.shape[2])
        moved = problem.times(problem.grouped(levels[:, block]), part).flatten(0, 1)
        matrix[:, block] = (moved.view_as(levels) * levels).sum(2)
        right[:, block] = (moved * problem.target).sum(1)
    if problem.grid.scheme.per_tensor:
        matrix, right = matrix.sum(0, keepdim=True), right.sum(0, keepdim=True)
    ridge = _RIDGE * matrix.diagonal(dim1=1, dim2=2).amax(1).clamp(min=_RIDGE)
    matrix.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    fit = torch.linalg.solve(matrix, right.unsqueeze(2)).squeeze(2).float().expand_as(scale)
    return torch.where(fit * scale > 0, problem.grid.legal(fit), scale)
