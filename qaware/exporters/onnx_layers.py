"""Layers of ONNX Runtime's own operators for packed integers: MatMulNBits and GatherBlockQuantized.

Both hold 2, 4 or 8 bits a weight, neighbours in one byte with the first in its lowest bits, counted from
zero up, and blocks of 16 to 256 weights (a power of two) with a float32 scale each (``ContribOperators.md``
of ONNX Runtime). Wider groups are several blocks of the same scale, which costs nothing in the file: scales
are stored once, in the scheme's precision, and are repeated when the file is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.engines.integer import StaticLinear
from qaware.engines.static_integer import become_integer_layer
from qaware.exporters.packed import StoredWeight, exact_scale
from qaware.exporters.packed_layers import PackedEmbedding, PackedLinear, become_packed, in_graph
from qaware.plan import Decision
from qaware.scheme import Scheme

WIDTHS = (2, 4, 8)
_BLOCKS = (256, 128, 64, 32, 16)
_PADDED = 32
"""The block of rows with one scale whose width fills no block."""
INT8_PRODUCTS = 4
"""The accuracy level of products whose activations are rounded to int8, for each block of each token."""


def bits_of(scheme: Scheme) -> int:
    """Bits that a weight takes in the file."""
    return next(width for width in WIDTHS if scheme.stored_bits <= width)


def block_of(scheme: Scheme, width: int) -> int | None:
    """Weights of one block; None where the groups fill none."""
    fitting = (block for block in _BLOCKS if scheme.block(width) % block == 0)
    return next(fitting, None if scheme.group_size else _PADDED)


class BlockWeight(StoredWeight):
    """A weight as both operators read it."""

    codes: Tensor
    """uint8 (rows, blocks, bytes)."""
    scale: Tensor
    """(rows, groups), in the scheme's precision."""
    zero_point: Tensor | None
    """uint8 (rows, bytes), one for each block, packed as the weights are; None: in the middle."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight)
        block = block_of(self.scheme, self.width)
        assert block is not None
        self.bits, self.size = bits_of(self.scheme), block
        self.offset = 2 ** (self.bits - 1)
        codes = (weight.data.int() + self.offset).to(torch.uint8)
        codes = F.pad(codes, (0, -self.width % block), value=self.offset)
        self.register_buffer("codes", pack(codes.unflatten(1, (-1, block)), self.bits))
        self.register_buffer("scale", exact_scale(weight))
        zero = weight.zero_point
        if zero is not None:
            zero = pack(self._by_block((zero.int() + self.offset).to(torch.uint8)), self.bits)
        self.register_buffer("zero_point", zero)

    def operands(self) -> list[Tensor]:
        """Scales, float32 (rows, blocks), and packed zero points, where it has any."""
        scale = self._by_block(self.scale.float())
        return [scale] if self.zero_point is None else [scale, self.zero_point]

    def integers(self) -> Tensor:
        """Read back."""
        return self._unpacked(self.codes.flatten(1))[:, : self.width]

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Read back."""
        scale = self.scale.float()
        if self.zero_point is None:
            return scale, None
        blocks, groups = self.codes.shape[1], scale.shape[1]
        return scale, self._unpacked(self.zero_point)[:, : blocks : blocks // groups]

    def _by_block(self, values: Tensor) -> Tensor:
        """(rows, groups) to (rows, blocks)."""
        rows, groups = values.shape
        blocks = self.codes.shape[1]
        if blocks == groups:
            return values
        return values.unsqueeze(-1).expand(rows, groups, blocks // groups).reshape(rows, blocks)

    def _unpacked(self, packed: Tensor) -> Tensor:
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)
        codes = (packed.unsqueeze(-1) >> shifts) & (2**self.bits - 1)
        integers: Tensor = (codes.flatten(1).int() - self.offset).to(torch.int8)
        return integers


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 (..., n) below ``2**bits`` to uint8 (..., ceil(n * bits / 8)), the first in the lowest bits."""
    count = 8 // bits
    parts = F.pad(values, (0, -values.shape[-1] % count)).unflatten(-1, (-1, count)).unbind(-1)
    packed: Tensor = parts[0]
    for index, part in enumerate(parts[1:], 1):
        packed = packed | (part << (index * bits))
    return packed.contiguous()


class BlockLinear(PackedLinear):
    """A linear layer of MatMulNBits; for export only, outside of one it gives zeros."""

    packed: BlockWeight
    level: int
    """0: activations stay float32; 4: they are rounded to int8."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), float32."""
        weight = self.packed
        attributes = {"K": weight.width, "N": weight.rows, "bits": weight.bits, "block_size": weight.size}
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (input, weight.codes, *weight.operands()),
            {**attributes, "accuracy_level": self.level},
            dtype=torch.float32,
            shape=(*input.shape[:-1], weight.rows),
            version=1,
        )
        biased: Tensor = y if self.bias is None else y + self.bias
        return biased


class BlockEmbedding(PackedEmbedding):
    """An embedding of GatherBlockQuantized; for export only."""

    packed: BlockWeight

    def forward(self, input: Tensor) -> Tensor:
        """int64 (...) to (..., embedding_dim), float32."""
        weight = self.packed
        padded = weight.codes.shape[1] * weight.size
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (weight.codes.flatten(1), input, *weight.operands()),
            {"bits": weight.bits, "block_size": weight.size, "gather_axis": 0, "quantize_axis": 1},
            dtype=torch.float32,
            shape=(*input.shape, padded),
            version=1,
        )
        values: Tensor = y[..., : weight.width] if padded > weight.width else y
        return values


_CLASSES: dict[str, type[BlockLinear] | type[BlockEmbedding]] = {
    "Linear": BlockLinear,
    "Embedding": BlockEmbedding,
}


def use_blocks(quantized: QuantizedModel, accuracy_level: int | None) -> None:
    """Turn the layers of ``quantized.module`` that these operators can hold into theirs, in place, ties kept.

    Args:
        quantized: those with static activations become integer layers; others stay what they are.
        accuracy_level: of all products; None: int8 activations where the scheme has them.

    Raises:
        QawareError: a scale does not fit its precision, or an embedding renormalizes its rows.
    """
    if in_graph(quantized):
        return
    modules: dict[str, Any] = dict(quantized.module.named_modules())
    shared: dict[int, BlockWeight] = {}
    for name, weight in quantized.weights.items():
        decision, key = quantized.plan.layer(name), weight.data.data_ptr()
        if isinstance(modules[name], StaticLinear):
            grid = quantized.activations[name]
            become_integer_layer(modules[name], "Linear", weight, modules[name].bias, grid, None, False)
        if not fits(decision):
            continue
        if key not in shared:
            shared[key] = BlockWeight(weight)
        become_packed(modules[name], decision, None, _CLASSES[decision.type])
        modules[name].packed = shared[key]
        if decision.type == "Linear":
            modules[name].level = level_of(decision, accuracy_level)


def fits(decision: Decision) -> bool:
    """Whether a layer is one of these operators."""
    scheme = decision.scheme
    if scheme is None or scheme.is_float or scheme.is_static or decision.type not in _CLASSES:
        return False
    return block_of(scheme, decision.width) is not None


def level_of(decision: Decision, chosen: int | None) -> int:
    """The accuracy level of one layer."""
    dynamic = decision.scheme is not None and decision.scheme.activation == "int8-dynamic"
    return (INT8_PRODUCTS if dynamic else 0) if chosen is None else chosen
