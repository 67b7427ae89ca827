"""Round to nearest on the scale with the smallest squared error, weighted by how much each input counts.

Candidates are shrunk ranges, as in Banner et al., "Post-training 4-bit quantization of convolution networks
for rapid-deployment" (NeurIPS 2019, arXiv:1810.05723); then scale and integers are solved for in turn, as in
ternary weight networks (Li et al. 2016, arXiv:1605.04711).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.roundings import Mse

_LARGEST, _SMALLEST = 1.2, 0.1
_REFINEMENTS = 4
_ENDS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)


def choose(weight: Tensor, grid: Grid, step: Mse, moments: Moments | None) -> Chosen:
    """The nearest values on the scales of :func:`search`."""
    scale, zero_point = search(weight, grid, step, importance(weight, moments))
    return Chosen(grid.round(weight, scale, zero_point), scale, zero_point)


def importance(weight: Tensor, moments: Moments | None) -> Tensor:
    """How much the square of each weight's error counts, the shape of ``weight``: the mean square of its
    input, where that is known."""
    if moments is None or not moments.seen:
        return torch.ones_like(weight)
    power = moments.hessian.diagonal(dim1=1, dim2=2)
    # An input that never was anything counts a little: nothing else says what its weight should be.
    power = power.clamp(min=1e-6 * float(power.mean()) or 1.0)
    return power.unsqueeze(1).expand(-1, len(weight) // moments.groups, -1).reshape(weight.shape)


def search(weight: Tensor, grid: Grid, step: Mse, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block with the smallest weighted squared error that was found.

    Args:
        weight: float32 (rows, width).
        grid: its grid.
        step: the options.
        counts: the weight of each square, the shape of ``weight``.

    Returns:
        Scale (float32) and zero point (int32), each (rows, width / block).
    """
    best = _Best(grid.blocks(weight), grid, grid.blocks(counts))
    scale, zero_point = grid.qparams(weight)
    blocks = len(best.weight)
    best.consider(scale.reshape(-1, 1)[:blocks], zero_point.reshape(-1, 1)[:blocks])
    for tried in _symmetric(best, step) if grid.scheme.symmetric else _ranges(best):
        best.consider(*tried)
    for _ in range(_REFINEMENTS):
        best.refine()
    return grid.unblock(best.scale, weight), grid.unblock(best.zero_point, weight)


class _Best:
    """The best scale and zero point of each block so far, each (blocks, 1)."""

    def __init__(self, weight: Tensor, grid: Grid, counts: Tensor) -> None:
        self.weight, self.grid, self.counts = weight, grid, counts
        self.error = torch.full_like(weight[:, :1], torch.inf)
        self.scale = torch.ones_like(self.error)
        self.zero_point = torch.zeros_like(self.error, dtype=torch.int32)

    def consider(self, scale: Tensor, zero_point: Tensor) -> None:
        """Keep it where it is better. ``scale`` is legal."""
        rounded = self.grid.round(self.weight, scale, zero_point)
        error = ((rounded - self.weight).square() * self.counts).sum(1, keepdim=True)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)

    def refine(self) -> None:
        """The least-squares scale of the integers of the best one; with zero points their neighbours too."""
        for shift in (0,) if self.grid.scheme.symmetric else (0, -1, 1):
            zero_point = (self.zero_point + shift).clamp(*self.grid.integers)
            levels = self.grid.round(self.weight, self.scale, zero_point) / self.scale
            size = (levels.square() * self.counts).sum(1, keepdim=True)
            fit = (levels * self.weight * self.counts).sum(1, keepdim=True) / size
            self.consider(self.grid.legal(torch.where(fit * self.scale > 0, fit, self.scale)), zero_point)


def _symmetric(best: _Best, step: Mse) -> Iterator[tuple[Tensor, Tensor]]:
    widest, zero_point = best.grid.widest(best.weight), torch.zeros_like(best.zero_point)
    for factor in torch.linspace(_LARGEST, _SMALLEST, step.candidates).tolist():
        yield best.grid.legal(widest * factor), zero_point
        if step.signed and best.grid.lopsided:
            yield best.grid.legal(widest * -factor), zero_point


def _ranges(best: _Best) -> Iterator[tuple[Tensor, Tensor]]:
    """Both ends drawn in, each by itself."""
    low, high = best.grid.integers
    least, most = (
        best.weight.amin(1, keepdim=True).clamp(max=0),
        best.weight.amax(1, keepdim=True).clamp(min=0),
    )
    for a, b in itertools.product(_ENDS, _ENDS):
        scale = best.grid.legal((b * most - a * least) / (high - low))
        yield scale, (low - (a * least / scale).round()).clamp(low, high).to(torch.int32)
