"""A range without the outermost values, however far out they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qaware.observers.histogram import BINS, HistogramObserver


class PercentileObserver(HistogramObserver):
    """The range that holds the central part of all values, from the counts of :class:`HistogramObserver`.

    The percentile calibration of Wu et al., "Integer quantization for deep learning inference" (2020),
    taken at each end by itself, as an asymmetric range needs. At most half of what ``central`` leaves over
    is cut off at either end, and the ends are edges of bins. So nothing is cut from fewer than 20,000 values,
    and the counts, which are exact for any order and number of ranks, make the range exact too.
    """

    central: ClassVar[float] = 0.9999
    """The share of values that stays, one of those that Wu et al. compare."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The two ends to clip at, float32 scalars."""
        cut = int(int(self.counts.sum()) * (1 - self.central) / 2)
        low = self._inside(self.counts, cut)
        high = BINS - self._inside(self.counts.flip(0), cut)
        start, width = self._bins()
        return (
            torch.maximum(start + width * low, self.min_val),
            torch.minimum(start + width * high, self.max_val),
        )

    @staticmethod
    def _inside(counts: Tensor, cut: int) -> int:
        """The first bin that holds a value beyond the outermost ``cut``."""
        return int((counts.cumsum(0) <= cut).sum())
