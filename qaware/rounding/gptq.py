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


def choose(weight: Tensor, grid: Grid, step: Gptq, moments: Moments | None) -> Chosen:
    """Integers whose errors make up for each other on the calibration data; without any, those of ``mse``."""
    if moments is None:
        return _nearest(weight, grid, step, None, "mse, as no input was seen")
    found = _factor(moments.hessian, step)
    if found is None:
        return _nearest(weight, grid, step, moments, "mse, as its Hessian has no inverse")
    size = grid.rows_at_once(weight) if moments.groups == 1 else len(weight)
    parts = [_rows(part, grid, step, moments, found) for part in weight.split(size)]
    damping = found[2]
    note = "" if damping == step.damping else f"damping {damping:g}, as its Hessian is singular"
    rounded, scale, zero_point, target = (
        part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)
    )
    return Chosen(rounded, scale, zero_point, note, target)


def _rows(
    weight: Tensor, grid: Grid, step: Gptq, moments: Moments, found: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounded weight, scale, zero point and target of some rows."""
    factor, order, damping = found
    hessian = _damped(moments.hessian.double(), damping)
    target = _target(weight, moments, hessian) if step.correct else weight
    hessian = hessian.float()
    work = _Work(target, grid, step, mse.importance(weight, moments))
    work.run(factor, order)
    problem = Problem(target, hessian, grid)
    rounded, scale = polish(problem, work.rounded, work.scale, work.zero_point, step.polish)
    return rounded, scale, work.zero_point, target


def _nearest(weight: Tensor, grid: Grid, step: Gptq, moments: Moments | None, why: str) -> Chosen:
    return dataclasses.replace(mse.choose(weight, grid, Mse(signed=step.signed), moments), note=why)


def _factor(hessian: Tensor, step: Gptq) -> tuple[Tensor, Tensor, float] | None:
    """The upper Cholesky factor of the inverse of the damped Hessian, float32 (groups, width, width), the
    order of its columns (groups, width), and the damping that it took."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    columns = torch.arange(hessian.shape[1], device=hessian.device).expand(diagonal.shape)
    order = diagonal.argsort(dim=1, descending=True, stable=True) if step.act_order else columns
    ordered = hessian
    if step.act_order:
        ordered = ordered.gather(1, order.unsqueeze(2).expand_as(hessian))
        ordered = ordered.gather(2, order.unsqueeze(1).expand_as(hessian))
    damping = step.damping
    for _ in range(_TRIES):
        upper = _inverse_factor(_damped(ordered.double(), damping))
        if upper is not None:
            return upper.float(), order, damping
        damping = max(damping, _LEAST_DAMPING) * _MORE
    return None


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse, where there is one; no more than two matrices are held."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    del matrix
    if bool(failed.any()):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if bool(failed.any()) or not bool(upper.isfinite().all()) else upper


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian``, changed in place: a share of its mean diagonal, or 1 where nothing but zeros was seen, is
    added to its diagonal."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    hessian.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, damping * mean, 1.0))
    return hessian


def _target(weight: Tensor, moments: Moments, hessian: Tensor) -> Tensor:
    """The real weight whose output from what enters is nearest to the float model's, ``weight`` itself where
    that is not known; float32 (rows, width). ``hessian`` is the damped one, float64."""
    cross = moments.cross
    if cross is None:
        return weight
    grouped = weight.double().view(moments.groups, -1, weight.shape[1])
    right = grouped @ cross.double().sub_(moments.hessian).add_(hessian)
    best: Tensor = torch.linalg.solve(hessian, right, left=False)
    return best.float().view_as(weight)


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
