"""Linear layers whose integers are multiplied by ``qaware::product``, and embeddings tied to them.

Activations enter as integers: those of the scheme, exactly, or, for weight-only schemes, 16-bit ones in two
digits of 8 bits, whose steps are 1/32639 of the token's largest value. That is closer than bfloat16 (steps
of 1/256 of each value) for all but extreme outliers, as fast, and the same integer kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.integer import StaticLinear
from qaware.exporters.aoti_product import LANES, WIDTHS, arrange, by_lane, codes_of, columns
from qaware.exporters.packed import StoredWeight, exact_scale
from qaware.exporters.packed_layers import (
    PackedEmbedding,
    PackedLinear,
    become_packed,
    in_graph,
)
from qaware.plan import Decision
from qaware.scheme import Scheme


class BlockedWeight(StoredWeight):
    """A weight as the kernel reads it."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight)
        self.bits, self.step = self.scheme.code_bits, 2 if self.scheme.is_stretched else 1
        low = self.scheme.range[0]
        self.offset = -2 * low // self.step
        """Twice the code of zero, which is between two codes where the levels are stretched."""
        codes = ((weight.data.int() - low) // self.step).to(torch.uint8)
        self.register_buffer("codes", arrange(codes, self.bits))
        self.register_buffer("scale", by_lane(exact_scale(weight)))
        zero = weight.zero_point
        self.register_buffer("zero_point", None if zero is None else by_lane(zero))

    def integers(self) -> Tensor:
        """Read back."""
        codes = self._codes(None)
        return ((codes - self.offset / 2) * self.step).to(torch.int8)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Read back."""
        zero = self.zero_point
        return self._by_row(self.scale, None).float(), None if zero is None else self._by_row(zero, None)

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """(code - zero) * scale for each group."""
        scale = self._by_row(self.scale, rows).float().unsqueeze(-1) * self.step
        codes = self._codes(rows).unflatten(-1, (-1, self.block)) - self.offset / 2
        if self.zero_point is not None:
            codes = codes - self._by_row(self.zero_point, rows).float().unsqueeze(-1)
        values: Tensor = (codes * scale).flatten(-2)
        return values

    def _codes(self, rows: Tensor | None) -> Tensor:
        codes = torch.stack(codes_of(self.codes, self.bits, rows), -2).flatten(-3)
        return codes[: self.rows] if rows is None else codes

    def _by_row(self, lanes: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return lanes.transpose(1, 2).flatten(0, 1)[: self.rows]
        return lanes[rows // LANES, :, rows % LANES]


class ProductLinear(PackedLinear):
    """A linear layer of integer products."""

    packed: BlockedWeight
    sums: Tensor | None
    """float32 (rows,): of the weight's values, which a zero point of the activation multiplies."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), float32."""
        weight, static = self.packed, self.static or ActivationRange(1.0, 0)
        stored = (weight.codes, weight.scale, weight.zero_point, self.sums)
        numbers = (weight.rows, weight.bits, weight.block, weight.offset, weight.step)
        rounding = (self.activation, static.scale, static.zero_point)
        x = input.reshape(-1, weight.width)
        y: Tensor = torch.ops.qaware.product(x, *stored, *numbers, *rounding)
        y = y.view(*input.shape[:-1], weight.rows)
        return y if self.bias is None else y + self.bias


def use_products(quantized: QuantizedModel) -> list[str]:
    """Turn the linear layers of ``quantized.module`` that the kernel can compute into ProductLinear, in
    place, with what they are tied to; return the activation of each.

    Raises:
        QawareError: a scale does not fit its precision, or an embedding renormalizes its rows.
    """
    if in_graph(quantized):
        return []
    modules: dict[str, Any] = dict(quantized.module.named_modules())
    fit = {
        weight.data.data_ptr()
        for name, weight in quantized.weights.items()
        if _fits(modules[name], quantized.plan.layer(name), weight)
    }
    shared: dict[int, BlockedWeight] = {}
    found = []
    for name, weight in quantized.weights.items():
        key, decision = weight.data.data_ptr(), quantized.plan.layer(name)
        if key not in fit or decision.type not in _CLASSES:
            continue
        module = modules[name]
        if key not in shared:
            shared[key] = BlockedWeight(weight)
        become_packed(module, decision, quantized.activations.get(name), _CLASSES[decision.type])
        module.packed = shared[key]
        if isinstance(module, ProductLinear):
            found.append(module.activation)
            shifts = module.activation != "none"
            module.register_buffer("sums", weight.dequantize().double().sum(1).float() if shifts else None)
    return found


_CLASSES: dict[str, type[PackedLinear] | type[PackedEmbedding]] = {
    "Linear": ProductLinear,
    "Embedding": PackedEmbedding,
}


def _fits(module: Any, decision: Decision, weight: QuantizedWeight) -> bool:
    """Whether the kernel computes this layer: whole bytes in each group, float32 around it."""
    plain = type(module) in (nn.Linear, StaticLinear) and module.weight.dtype == torch.float32
    return plain and has_product(weight.scheme, decision.type, weight.data.shape[1])


def has_product(scheme: Scheme, kind: str, width: int) -> bool:
    """Whether the kernel knows the width of the integers, and a group of a row fills whole bytes.

    Args:
        scheme: of the layer.
        kind: class name of the module.
        width: weights of a row.
    """
    known = kind == "Linear" and scheme.code_bits in WIDTHS
    return known and scheme.block(width) % columns(scheme.code_bits) == 0
