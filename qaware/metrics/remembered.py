"""Logits that are needed again: those of the float model, which every stage is compared with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qaware.metrics.windows import data_hash

MOST = 1 << 29
"""Bytes that are kept: the logits of 128 windows of 128 tokens and 8192 words."""


class Remembered:
    """``predict`` that keeps the logits of the first inputs, and computes those of the others each time.

    The results are the same, bit for bit; nobody may change them in place.

    Args:
        predict: tensors to logits, the same for the same tensors.
        most: bytes that are kept.
    """

    def __init__(self, predict: Callable[..., Tensor], most: int = MOST) -> None:
        self.predict, self.most = predict, most
        self.overflowed = False
        """Whether there were logits that are not kept."""
        self._known: dict[str, Tensor] = {}
        self._size = 0

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Logits of ``predict``."""
        key = data_hash(tensors)
        if key in self._known:
            return self._known[key]
        logits = self.predict(*tensors)
        if self._size + logits.nbytes <= self.most:
            self._size += logits.nbytes
            self._known[key] = logits
        else:
            self.overflowed = True
        return logits
