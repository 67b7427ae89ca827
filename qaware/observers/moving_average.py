"""A range that follows the data: the average of the batches' extremes, the latest weighing most."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qaware.observers.minmax import MinMaxObserver

AVERAGING_CONSTANT = 0.01
"""Weight of a new batch, the one of PyTorch's ``MovingAverageMinMaxObserver``."""


class MovingAverageObserver(MinMaxObserver):
    """Exponential averages of the batches' minima and maxima; the first batch is where they start.

    One freak batch moves the range by a hundredth of what it moves :class:`MinMaxObserver` by, and in
    training the range follows activations that shrink. The order of the batches matters.

    Over ranks it is the mean of their averages, weighed by the batches that each took since they were last
    equal: a rank whose share had nothing for this layer does not count. In training, which reduces after
    every batch, that is the average of the ranks' mean extremes.
    """

    exact: ClassVar[bool] = False
    reduction: ClassVar[dict[str, str]] = {"min_val": "mean", "max_val": "mean"}

    taken: Tensor
    """Batches since the ranks were last equal, int64. Not saved: when a checkpoint is written, they are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64), persistent=False)

    def reset_parameters(self) -> None:
        """Forget the statistics."""
        super().reset_parameters()
        self.taken.zero_()

    def _take(self, x: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        first = self.min_val > self.max_val
        for average, new in ((self.min_val, low), (self.max_val, high)):
            moved = torch.where(first, new, average + AVERAGING_CONSTANT * (new - average))
            average.copy_(torch.where(finite, moved, average))
        self.taken += finite
