"""The grid of one layer's weight, as rounding methods see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import _fake_quantize_affine

from qaware.scheme import Scheme

_SMALLEST = 1e-10


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
        self.offset = 0.5 if getattr(self.scheme, "levels", "all") == "stretched" else 0.0
        """Half a step where the levels lie between integers."""

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) that follow from ``weight`` by itself, each
        (rows, width / block)."""
        scale, zero_point = self.quantizer._qparams(weight)
        return scale.float(), zero_point.to(torch.int32)

    def legal(self, scale: Tensor) -> Tensor:
        """``scale`` in the precision that ships; never zero, so that dividing by it is safe."""
        rounded = scale.to(getattr(torch, self.scheme.scale_dtype)).float()
        return torch.where(rounded.abs() < _SMALLEST, _smallest(self.scheme), rounded)

    def round(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The nearest values to ``weight`` (rows, columns) of a scale and zero point (rows, columns / block)."""
        block = (1, weight.shape[1] // scale.shape[1])
        shift = (self.offset * scale).repeat_interleave(block[1], dim=1)
        rounded: Tensor = _fake_quantize_affine(
            weight - shift, block, scale, zero_point, torch.int32, *self.integers
        )
        return rounded + shift


def _smallest(scheme: Scheme) -> float:
    """Of float16 the smallest scale whose reciprocal is finite."""
    return 2.0**-15 if scheme.scale_dtype == "float16" else _SMALLEST
