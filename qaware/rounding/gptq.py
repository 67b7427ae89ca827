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
    work = _Work(target, grid, step, mse.importance(weight, moments))
    work.run(factor, order)
    problem = Problem(target, moments.hessian, _ridge(moments.hessian, damping), grid)
    rounded, scale = polish(problem, work.rounded, work.scale, work.zero_point, step.polish)
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
        damped = _ordered(hessian, order)
        damped.diagonal(dim1=1, dim2=2).add_(_ridge(damped, damping))
        upper = _inverse_factor(damped)
        if upper is not None:
            return upper.float(), order, damping
        damping = max(damping, _LEAST_DAMPING) * _MORE
    return None


def _ordered(hessian: Tensor, order: Tensor) -> Tensor:
    """``hessian`` with its rows and columns in ``order``, float64; some rows at a time, as nothing that GPTQ
    holds is larger."""
    ordered = torch.empty_like(hessian, dtype=torch.float64)
    for group, places in enumerate(order):
        for rows, found in zip(places.split(_ROWS), ordered[group].split(_ROWS), strict=True):
            found.copy_(hessian[group][rows][:, places])
    return ordered


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse of ``matrix``, where there is one, in its memory."""
    work = matrix.mT  # the same numbers in the order that LAPACK works in without a copy
    failed = torch.empty(len(work), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work, out=(work, failed))
    if bool(failed.any()):
        return None
    torch.cholesky_inverse(work, out=work)
    torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
    return None if bool(failed.any()) or not bool(work.sum().isfinite()) else work


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
    """One weight on its way."""

    def __init__(self, target: Tensor, grid: Grid, step: Gptq, counts: Tensor) -> None:
        """
        Args:
            target: float32 (rows, width), what the rounded weight should compute.
            grid: its grid.
            step: the options.
            counts: how much the square of each weight's error counts, the shape of ``target``.
        """
        self.target, self.grid, self.step, self.counts = target, grid, step, counts
        self.rounded = target
        self.size = grid.scheme.block(target.shape[1])
        self.scale, self.zero_point = self._qparams(target, counts)

    def run(self, factor: Tensor, order: Tensor) -> None:
        """Round all columns; see :func:`_factor` for the arguments."""
        groups, width = order.shape
        columns = order.unsqueeze(1).expand(-1, len(self.target) // groups, -1)
        left = self.target.view(groups, -1, width).gather(2, columns)
        rounded = torch.empty_like(left)
        rescales = self.size < width and not self.step.act_order
        # Whole groups, so that all columns of a group are up to date when the first of them is reached.
        size = -(-self.step.block // self.size) * self.size if rescales else self.step.block
        for start in range(0, width, size):
            end = min(start + size, width)
            errors = torch.empty_like(left[:, :, start:end])
            for column in range(start, end):
                if rescales and column % self.size == 0:
                    self._rescale(left, column)
                rounded[:, :, column] = self._round(left[:, :, column], order[:, column])
                pivot = factor[:, column, column].unsqueeze(1)
                error = (left[:, :, column] - rounded[:, :, column]) / pivot
                errors[:, :, column - start] = error
                left[:, :, column:end] -= error.unsqueeze(2) * factor[:, column, column:end].unsqueeze(1)
            left[:, :, end:] -= errors @ factor[:, start:end, end:]
        self.rounded = torch.empty_like(rounded).scatter(2, columns, rounded).view_as(self.target)

    def _round(self, column: Tensor, places: Tensor) -> Tensor:
        """Nearest values to ``column`` (groups, rows), which is column ``places`` (groups,) of the weight."""
        blocks = (places // self.size).view(-1, 1, 1).expand(*column.shape, 1)
        grouped = (
            qparam.view(*column.shape, -1).gather(2, blocks) for qparam in (self.scale, self.zero_point)
        )
        scale, zero_point = (qparam.reshape(-1, 1) for qparam in grouped)
        return self.grid.round(column.reshape(-1, 1), scale, zero_point).view_as(column)

    def _rescale(self, left: Tensor, column: int) -> None:
        """Scales for a group with the errors that it has taken over, not for the weight as it was."""
        end, block = column + self.size, column // self.size
        group = left[:, :, column:end].reshape(-1, self.size)
        scale, zero_point = self._qparams(group, self.counts[:, column:end])
        self.scale[:, block : block + 1], self.zero_point[:, block : block + 1] = scale, zero_point

    def _qparams(self, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        if self.step.scales == "minmax":
            scale, zero_point = self.grid.qparams(weight)
        else:
            scale, zero_point = mse.search(weight, self.grid, Mse(signed=self.step.signed), counts)
        return scale.clone(), zero_point.clone()
