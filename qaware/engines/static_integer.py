"""Layers whose weights and activations are integers: what the eager engine converts to.

Every layer rounds its input and its output to int8 with known ranges, so each stands for one integer
kernel, whatever is around it; rounding a value that is on the grid already changes nothing. Here the
integers are multiplied as floats, which gives the same sums. Exporters replace ``arithmetic`` by the
operators that their runtime recognizes, or a whole layer by their runtime's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.base import ActivationRange, QuantizedWeight

INT8 = (-128, 127)


class Arithmetic:
    """How an integer layer rounds activations and reads its weight, in plain torch."""

    def round_trip(self, x: Tensor, grid: ActivationRange) -> Tensor:
        """``x`` (any shape, float32) on the int8 grid, as float32 values."""
        return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, *INT8)

    def weight(self, layer: IntegerLayer) -> Tensor:
        """The weight's float32 values, in the layer's own shape."""
        blocks = layer.weight.float().view(*layer.weight_scale.shape, -1)
        blocks = (blocks - layer.weight_zero_point.unsqueeze(-1)) * layer.weight_scale.unsqueeze(-1)
        return blocks.view(layer.weight.shape)


class Requantize(nn.Module):
    """Rounds the result of a function to int8."""

    def __init__(self, grid: ActivationRange) -> None:
        super().__init__()
        self.grid = grid
        self.arithmetic = Arithmetic()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        return self.arithmetic.round_trip(x.float(), self.grid).to(x.dtype)


class IntegerLayer(nn.Module):
    """The part that convolutions and linear layers share."""

    weight: Tensor
    """int8 parameter, in the shape of the float weight."""
    bias: Any
    """None or float32 (rows,), with a batch norm folded into it."""
    weight_scale: Tensor
    """float32 (rows, blocks)."""
    weight_zero_point: Tensor
    """int64 (rows, blocks)."""
    input_grid: ActivationRange | None
    """None: the input stays float."""
    output_grid: ActivationRange | None
    """None: the output stays float."""
    relu: bool
    """A ReLU's ceiling needs no operation: the output grid ends at or below it."""
    arithmetic: Arithmetic

    def forward(self, x: Tensor) -> Tensor:
        """As of the float layer, in float32 inside."""
        y = x.float()
        if self.input_grid is not None:
            y = self.arithmetic.round_trip(y, self.input_grid)
        y = self.product(y, self.arithmetic.weight(self))
        if self.relu:
            y = torch.relu(y)
        if self.output_grid is not None:
            y = self.arithmetic.round_trip(y, self.output_grid)
        return y.to(x.dtype)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Bias included."""
        raise NotImplementedError


class IntegerLinear(IntegerLayer, nn.Linear):
    """A linear layer of integers."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(x, weight, self.bias)


class IntegerConv1d(IntegerLayer, nn.Conv1d):
    """A convolution of integers."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """(batch, in_channels, length) to (batch, out_channels, length)."""
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y


class IntegerConv2d(IntegerLayer, nn.Conv2d):
    """A convolution of integers."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y


CLASSES: dict[type[nn.Module], type[IntegerLayer]] = {
    nn.Linear: IntegerLinear,
    nn.Conv1d: IntegerConv1d,
    nn.Conv2d: IntegerConv2d,
}


def become_integer_layer(
    module: Any,
    kind: str,
    weight: QuantizedWeight,
    bias: Tensor | None,
    input_grid: ActivationRange | None,
    output_grid: ActivationRange | None,
    relu: bool,
) -> None:
    """Turn a float layer into an integer one, in place.

    Args:
        module: a Linear, Conv1d or Conv2d, of that class or derived from it.
        kind: ``Linear``, ``Conv1d`` or ``Conv2d``.
        weight: the integers, (rows, width); a convolution's are flattened.
        bias: float32 (rows,), or None.
        input_grid, output_grid: the int8 grids around the product; None where it stays float.
        relu: whether a ReLU is between product and output grid.
    """
    assert weight.scale is not None
    shape = module.weight.shape
    scale = weight.scale
    zero_point = torch.zeros_like(scale) if weight.zero_point is None else weight.zero_point
    module.__class__ = CLASSES[getattr(nn, kind)]
    module.weight = nn.Parameter(weight.data.view(shape), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    module.register_buffer("weight_scale", scale)
    module.register_buffer("weight_zero_point", zero_point.to(torch.int64))
    module.input_grid, module.output_grid, module.relu = input_grid, output_grid, relu
    module.arithmetic = Arithmetic()
