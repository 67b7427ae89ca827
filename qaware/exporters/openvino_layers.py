"""Weights in the form that OpenVINO keeps compressed: Constant, Convert, Subtract, Multiply.

Its CPU plugin recognizes these four in front of a product and reads the integers there. What the constant
holds, int8 or two weights a byte, is changed in the finished model: torch has no tensors of 4 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.engines.integer import StaticLinear
from qaware.engines.static_integer import IntegerLayer, become_integer_layer
from qaware.exporters.packed import StoredWeight
from qaware.exporters.packed_layers import (
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    become_packed,
    in_graph,
)
from qaware.scheme import Scheme

HALF_BYTE = 4
_CLASSES = {
    "Linear": PackedLinear,
    "Embedding": PackedEmbedding,
    "Conv1d": PackedConv1d,
    "Conv2d": PackedConv2d,
}


class PlainWeight(StoredWeight):
    """A weight of a byte for each integer."""

    codes: Tensor
    """(rows, groups, block): int8, or, with zero points, uint8 counted from zero up."""
    scale: Tensor
    """float32 (rows, groups, 1)."""
    zeros: Tensor | None
    """uint8 (rows, groups, 1)."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight)
        assert weight.scale is not None
        self.bits = stored_bits(self.scheme, weight.data.shape[1])
        codes, zero = weight.data.unflatten(1, (weight.scale.shape[1], -1)), weight.zero_point
        self.register_buffer("codes", codes if zero is None else self._unsigned(codes))
        self.register_buffer("scale", weight.scale.unsqueeze(-1))
        self.register_buffer("zeros", None if zero is None else self._unsigned(zero.unsqueeze(-1)))

    def _unsigned(self, values: Tensor) -> Tensor:
        unsigned: Tensor = (values.int() + 2 ** (self.bits - 1)).to(torch.uint8)
        return unsigned

    def _signed(self, values: Tensor) -> Tensor:
        same = values.dtype == torch.int8
        return values if same else (values.int() - 2 ** (self.bits - 1)).to(torch.int8)

    def integers(self) -> Tensor:
        """Read back."""
        return self._signed(self.codes).flatten(1)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Read back."""
        zeros = None if self.zeros is None else self._signed(self.zeros).squeeze(-1)
        return self.scale.squeeze(-1), zeros

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """Of all rows, also where a few are asked for: the runtime picks them before it converts."""
        values = self.codes.float()
        if self.zeros is not None:
            values = values - self.zeros.float()
        table = (values * self.scale).view(self.rows, self.width)
        return table if rows is None else F.embedding(rows, table)


def stored_bits(scheme: Scheme, width: int) -> int:
    """Bits that a weight takes, ``width`` in a row: 8 in odd blocks, too, which OpenVINO's CPU plugin reads
    wrongly where two weights share a byte."""
    return HALF_BYTE if scheme.stored_bits <= HALF_BYTE and scheme.block(width) % 2 == 0 else 8


def use_plain(quantized: QuantizedModel) -> dict[str, int]:
    """Give the layers of ``quantized.module`` such weights, in place, ties kept; those with static
    activations become integer layers. Activations of all others stay float.

    Returns:
        The bits of each weight, by the name of the module that holds it.

    Raises:
        QawareError: an embedding renormalizes its rows.
    """
    if in_graph(quantized):
        return {}
    modules: dict[str, Any] = dict(quantized.module.named_modules())
    shared: dict[int, PlainWeight] = {}
    bits: dict[str, int] = {}
    for name, weight in quantized.weights.items():
        module, decision, key = modules[name], quantized.plan.layer(name), weight.data.data_ptr()
        assert decision.scheme is not None
        if isinstance(module, StaticLinear):
            grid = quantized.activations[name]
            become_integer_layer(module, "Linear", weight, module.bias, grid, None, False)
        if weight.scheme.is_float or (isinstance(module, IntegerLayer) and decision.scheme.is_static):
            continue
        if key not in shared:
            shared[key] = PlainWeight(weight)
            bits[f"{name}.packed"] = shared[key].bits
        become_packed(module, decision, None, _CLASSES[decision.type])
        module.packed, module.activation = shared[key], "none"
    return bits
