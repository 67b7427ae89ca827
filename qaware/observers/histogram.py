"""A range that cuts off outliers where that makes the int8 values better."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qaware.observers.minmax import MinMaxObserver

BINS = 2048
LOWEST, HIGHEST = -128, 127
_CANDIDATES = 128
_ROUNDS = 4


class HistogramObserver(MinMaxObserver):
    """The clipping range with the smallest expected squared error of int8 rounding.

    Two passes over the same batches: the first finds the extremes, the second counts on that frozen
    range. Extremes and integer counts are exact for any order and number of ranks, which one pass that
    widens its bins as it goes is not.

    The range is found as in PyTorch's ``HistogramObserver`` and in Banner et al., "Post training 4-bit
    quantization of convolutional networks for rapid-deployment" (NeurIPS 2019): what a smaller step wins
    inside the range is weighed against what clipping loses outside. Here each end is searched in turn,
    and the error is integrated exactly under a density that is flat within a bin.
    """

    exact: ClassVar[bool] = False
    reduction: ClassVar[dict[str, str]] = {**MinMaxObserver.reduction, "counts": "sum"}
    passes: ClassVar[int] = 2

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Integers: a cast of the model to half precision leaves them alone, and their sum is exact.
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Forget the statistics."""
        super().reset_parameters()
        self.counts.zero_()

    @property
    def seen(self) -> bool:
        """Whether any value was counted, which is in the second pass."""
        return bool(self.counts.any())

    def _take(self, x: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        if self.pass_index == 0:
            super()._take(x, low, high, finite)
        elif bool(finite) and bool(self.min_val <= self.max_val):
            self.counts += torch.bincount(self._bin(x.detach().float().flatten()), minlength=BINS)

    def _bin(self, x: Tensor) -> Tensor:
        start, width = self._bins()
        return ((x - start) / width).long().clamp_(0, BINS - 1)

    def _bins(self) -> tuple[Tensor, Tensor]:
        """Left edge of the first bin and the width of each; together they cover zero, as every grid does."""
        start, end = self.min_val.clamp(max=0), self.max_val.clamp(min=0)
        width = (end - start) / BINS
        return start, torch.where(width > 0, width, torch.ones_like(width))

    def range(self) -> tuple[Tensor, Tensor]:
        """The two ends to clip at, float32 scalars."""
        mass = self.counts.double()
        # Values pile up at exactly zero (ReLU, padding), which is on every grid and costs nothing.
        mass[self._bin(torch.zeros_like(self.min_val))] = 0
        if not bool(mass.any()):
            return super().range()
        start, width = self._bins()
        steps = torch.arange(BINS + 1, dtype=torch.float64, device=mass.device)
        low, high = best_range(start.double() + width.double() * steps, mass)
        return low.float(), high.float()


def best_range(edges: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The ends, no wider than ``edges``, with the smallest :func:`rounding_error`.

    Args:
        edges: float64 (bins + 1), increasing, from 0 or less to 0 or more.
        mass: float64 (bins), how many values each bin holds.
    """
    shares = torch.arange(_CANDIDATES, 0, -1, dtype=edges.dtype, device=edges.device) / _CANDIDATES
    lows, highs = edges[0] * shares, edges[-1] * shares
    low, high = lows[0], highs[0]
    for _ in range(_ROUNDS):
        high = highs[rounding_error(edges, mass, low.expand_as(highs), highs).argmin()]
        low = lows[rounding_error(edges, mass, lows, high.expand_as(lows)).argmin()]
    return low, high


def rounding_error(edges: Tensor, mass: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Sum of squared differences between values and their int8 roundings, for several ranges at once.

    Args:
        edges, mass: see :func:`best_range`; values are spread evenly within a bin.
        low, high: float64 (ranges), with zero between them.

    Returns:
        float64 (ranges).
    """
    scale = ((high - low) / (HIGHEST - LOWEST)).unsqueeze(1)
    zero_point = LOWEST - (low.unsqueeze(1) / scale).round()
    x = edges / scale
    nearest = x.round().clamp(LOWEST - zero_point, HIGHEST - zero_point)
    # An antiderivative of the squared distance (in steps) to the nearest integer of the range.
    integral = nearest / 12 + (x - nearest) ** 3 / 3
    return (integral.diff(dim=1) * (mass / edges.diff())).sum(1) * scale.squeeze(1) ** 3
