"""The grid of one layer's weight, as rounding methods see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qaware.engines.levels import fake_quantize
from qaware.scheme import Scheme

_NUMBERS = 1 << 19
_LEAST_ROWS = 256
"""Each part goes through all columns, one after the other."""


class Grid:
    """Scales and values that a weight (rows, width) may take: those of the layer's own fake-quantizer.

    The value of an integer q is ``(q - zero_point + offset) * scale``. Weights here are float32.
    """

    def __init__(self, quantizer: Any) -> None:
        """
        Args:
            quantizer: the layer's ``WeightFakeQuantizer``.
        """
        self.quantizer = quantizer
        self.scheme: Scheme = quantizer.scheme
        self.integers: tuple[int, int] = quantizer.integers
        """Smallest and largest integer."""
        self.offset = 0.5 if self.scheme.is_stretched else 0.0
        """Half a step where the levels lie between integers."""
        low, high = self.integers
        narrowed = self.scheme.level_set is None and low == -high
        self.lopsided = self.scheme.symmetric and not self.scheme.is_mirrored and not narrowed
        """Whether a scale below zero is another grid: its longer side is the other one."""

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) that follow from ``weight`` by itself, each
        (rows, width / block)."""
        scale, zero_point = self.quantizer.chosen(weight)
        return scale.float(), zero_point.to(torch.int32)

    def legal(self, scale: Tensor) -> Tensor:
        """``scale`` in the precision that ships, never zero; float32."""
        legal: Tensor = self.quantizer.legal(scale.abs())
        return torch.where(scale < 0, -legal.float(), legal.float())

    def round(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The nearest values to ``weight`` (rows, columns) of a scale and zero point (rows, columns /
        block)."""
        return fake_quantize(weight, scale, zero_point, self.scheme, self.integers)

    def blocks(self, weight: Tensor) -> Tensor:
        """The weights that share one scale, (blocks, weights of a block)."""
        return weight.reshape(1 if self.scheme.per_tensor else -1, self._size(weight))

    def unblock(self, qparam: Tensor, weight: Tensor) -> Tensor:
        """A scale or zero point of each block (blocks, 1) as (rows, width / block), for the whole of
        ``weight``."""
        return qparam.expand(len(weight), 1) if self.scheme.per_tensor else qparam.reshape(len(weight), -1)

    def rows_at_once(self, weight: Tensor) -> int:
        """How many rows of ``weight`` (rows, width) are rounded at once: what is held meanwhile is many times
        their size."""
        if self.scheme.per_tensor:
            return len(weight)
        return max(_NUMBERS // weight.shape[1], _LEAST_ROWS)

    def widest(self, weight: Tensor) -> Tensor:
        """The legal scale of the largest absolute value, for ``weight`` (blocks, weights of a block):
        (blocks, 1). With zero points that of the whole range from the smallest to the largest."""
        low, high = self.integers
        if self.scheme.symmetric:
            reach = 2 * weight.abs().amax(1, keepdim=True)
        else:
            reach = weight.amax(1, keepdim=True).clamp(min=0) - weight.amin(1, keepdim=True).clamp(max=0)
        return self.legal(reach / (high - low))

    def _size(self, weight: Tensor) -> int:
        return weight.numel() if self.scheme.per_tensor else self.scheme.block(weight.shape[1])
