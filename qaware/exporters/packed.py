"""Layers that hold integers at their width and compute what the converted layers compute.

The modules engine keeps every integer in a byte, which torchao can compute with. A file should be as
small as the recipe promises, so these layers hold the same integers in bit planes: 4 bits are one
plane of 4, 3 bits a plane of 2 and one of 1, 7 bits planes of 4, 2 and 1; 8 bits stay int8.

A byte of a plane holds columns that are far apart (column c and column c + width / 2 for 4 bits)
rather than neighbours. Unpacking then reads and writes whole vectors: the compiled kernel of a
1024 x 1024 layer took 0.50 ms for one token, 1.7 ms with neighbours and 0.29 ms with plain floats.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.activation_fake_quant import INT8
from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.static_integer import IntegerLayer
from qaware.engines.weight_fake_quant import integer_dtype
from qaware.errors import QawareError
from qaware.plan import Decision
from qaware.scheme import Scheme

PLANES = (4, 2, 1)


def pack(data: Tensor, scheme: Scheme) -> dict[int, Tensor]:
    """int8 (rows, width) in the range of ``scheme`` to planes by their bits, the lowest bits first.

    Codes in a plane count from the smallest integer of the range, stretched ones, which are odd, by twos; 8
    bits stay the int8 they are.
    """
    if scheme.bits == 8:
        return {8: data.contiguous()}
    codes = ((data - scheme.range[0]) // (2 if scheme.is_stretched else 1)).to(torch.uint8)
    planes = {}
    for plane in (p for p in PLANES if scheme.bits & p):
        planes[plane] = fold(codes & (2**plane - 1), plane)
        codes = codes >> plane
    return planes


def fold(values: Tensor, plane: int) -> Tensor:
    """uint8 (rows, width) below ``2**plane`` to uint8 (rows, ceil(width * plane / 8))."""
    parts = 8 // plane
    columns = F.pad(values, (0, -values.shape[1] % parts)).chunk(parts, 1)
    folded = torch.zeros_like(columns[0])
    for index, part in enumerate(columns):
        folded |= part << (index * plane)
    return folded


def unfold(packed: Tensor, plane: int) -> list[Tensor]:
    """uint8 (..., bytes) to one float32 (..., bytes) for each part of the row, in the row's order."""
    mask = 2**plane - 1
    # Inductor's vector code is fast for a mask and an exact product, slow for a shift of bytes.
    return [(packed & (mask << shift)).float() * 2.0**-shift for shift in range(0, 8, plane)]


def round_per_token(x: Tensor) -> Tensor:
    """``x`` on an asymmetric int8 grid for each token (last axis), same shape and dtype.

    These are the operators that torchao's linear runs. Its Python functions around them also switch
    gradients off, and torch.export cuts the graph at each switch: time quadratic in the layers.
    """
    ops: Any = torch.ops.torchao
    block = [1] * (x.dim() - 1) + [x.shape[-1]]
    scale, zero = ops.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, *INT8, None, None, torch.int8)
    grid = (block, scale, zero, torch.int8, *INT8)
    return cast(Tensor, ops.dequantize_affine(ops.quantize_affine(x, *grid), *grid, output_dtype=x.dtype))


class PackedWeight(nn.Module):
    """One quantized weight; layers that share it share one copy in the file."""

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.scheme, self.width = weight.scheme, weight.data.shape[1]
        planes = pack(weight.data, self.scheme)
        self.planes = tuple(planes)
        self.step = 2 if self.scheme.is_stretched else 1
        """From one integer to the next."""
        self.offset = 0 if 8 in planes else -self.scheme.range[0] / self.step
        """The code of zero, between two codes where the levels are stretched."""
        for plane, packed in planes.items():
            self.register_buffer(f"plane{plane}", packed)
        self.register_buffer("scale", _exact(weight))
        self.register_buffer("zero_point", weight.zero_point)

    def codes(self, rows: Tensor | None = None) -> list[Tensor]:
        """float32 (..., columns): the row's parts in order, which together are at least its width."""
        parts: list[Tensor] = []
        shift = 0
        for plane in self.planes:
            stored = _pick(getattr(self, f"plane{plane}"), rows)
            found = [stored.float()] if plane == 8 else unfold(stored, plane)
            # Planes cut the row differently, so several are added as whole rows.
            parts = found if not parts else [_join(parts, self.width) + _join(found, self.width) * 2.0**shift]
            shift += plane
        return parts

    def integers(self) -> Tensor:
        """int8 (rows, width): what was packed."""
        return ((_join(self.codes(), self.width) - self.offset) * self.step).to(torch.int8)

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """float32 (rows, width), or (*rows.shape, width) for the given rows only."""
        parts = self.codes(rows)
        scale = _pick(self.scale, rows).float()
        if self.step > 1:
            scale = scale * self.step
        zero = torch.zeros_like(scale) if self.zero_point is None else _pick(self.zero_point, rows).float()
        if scale.shape[-1] > 1 and scale.shape[-1] % len(parts):
            parts = [_join(parts, self.width)]
        # Scaled before they are joined, so that inductor makes one pass over the weight.
        scales, zeros = _spread(scale, len(parts)), _spread(zero + self.offset, len(parts))
        return _join([_affine(p, s, z) for p, s, z in zip(parts, scales, zeros, strict=True)], self.width)

    def tensor(self, activation: str, dtype: torch.dtype) -> Tensor:
        """The weight of the converted layer, for model code that reads ``layer.weight`` itself."""
        scale, block = self.scale.float(), (1, self.scheme.block(self.width))
        zero = torch.zeros_like(scale, dtype=torch.int8) if self.zero_point is None else self.zero_point
        rounding = "int8_asym_per_token" if activation == "int8-dynamic" else None
        grid = (integer_dtype(self.scheme), block, dtype, rounding)
        return cast(Tensor, IntxUnpackedToInt8Tensor(self.integers(), scale, zero, *grid))


class PackedLinear(nn.Linear):
    """A linear layer on a packed weight; its input is rounded as the converted layer rounds it."""

    packed: PackedWeight
    activation: str
    static: ActivationRange | None
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The converted layer's weight, unpacked at each use."""
        return self.packed.tensor(self.activation, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), dtype of ``input``."""
        return F.linear(self.round(input), self.packed.dequantize().to(self.dtype), self.bias)

    def round(self, input: Tensor) -> Tensor:
        """The input as integers can hold it, same shape and dtype; unchanged for weight-only schemes."""
        if self.activation == "int8-dynamic":
            return round_per_token(input)
        if self.static is None:
            return input
        scale, zero = self.static.scale, self.static.zero_point
        # What torch.fake_quantize_per_tensor_affine computes; torch.export cannot trace that operator.
        integers = ((input.float() * (1 / scale)).round() + zero).clamp(*INT8)
        return ((integers - zero) * scale).to(input.dtype)


class PackedEmbedding(nn.Embedding):
    """An embedding on a packed table; only the rows that are looked up are unpacked."""

    packed: PackedWeight
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The converted table, unpacked at each use; for heads that read it."""
        return self.packed.tensor("none", self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """int64 (...) to (..., embedding_dim)."""
        return self.packed.dequantize(input).to(self.dtype)


class PackedConvolution(nn.Module):
    """The part that convolutions on a packed weight share."""

    packed: PackedWeight
    bias: Any
    shape: torch.Size
    """Of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """As of the float layer, in float32 inside."""
        layer: Any = self
        weight = self.packed.dequantize().view(self.shape)
        y: Tensor = layer._conv_forward(input.float(), weight, self.bias)
        return y.to(input.dtype)


class PackedConv1d(PackedConvolution, nn.Conv1d):
    """(batch, in_channels, length) to (batch, out_channels, length)."""


class PackedConv2d(PackedConvolution, nn.Conv2d):
    """(batch, in_channels, height, width) to (batch, out_channels, height, width)."""


_CLASSES = {
    "Linear": PackedLinear,
    "Embedding": PackedEmbedding,
    "Conv1d": PackedConv1d,
    "Conv2d": PackedConv2d,
}


def pack_layers(quantized: QuantizedModel) -> None:
    """Turn the integer layers of ``quantized.module`` into packed ones, in place, ties kept; those whose
    activations are integers too stay what they are.

    Raises:
        QawareError: a scale does not fit its precision, or an embedding renormalizes its rows.
    """
    modules: dict[str, Any] = dict(quantized.module.named_modules())
    shared: dict[int, PackedWeight | nn.Parameter] = {}
    for name, weight in quantized.weights.items():
        decision, key = quantized.plan.layer(name), weight.data.data_ptr()
        # A layer that is no module any more is part of a converted graph.
        if name not in modules or _multiplies_integers(modules[name], decision):
            continue
        if weight.scheme.is_float:
            # Float16 layers already store what they should; only the tie was lost when they were copied.
            modules[name].weight = shared.setdefault(key, nn.Parameter(weight.data, requires_grad=False))
            continue
        if key not in shared:
            shared[key] = PackedWeight(weight)
        _become_packed(modules[name], decision, quantized.activations.get(name))
        modules[name].packed = shared[key]


def _multiplies_integers(module: nn.Module, decision: Decision) -> bool:
    assert decision.scheme is not None
    return isinstance(module, IntegerLayer) and decision.scheme.is_static


def _become_packed(module: Any, decision: Decision, static: ActivationRange | None) -> None:
    """By class, as the engine does: the object keeps its hooks and every place that holds it."""
    assert decision.scheme is not None
    if getattr(module, "max_norm", None) is not None:
        raise QawareError(f"{decision.module}: max_norm {module.max_norm} cannot be exported; use None")
    module.dtype, module.activation, module.static = module.weight.dtype, decision.scheme.activation, static
    module.shape = module.weight.shape
    del module.weight
    module.__class__ = _CLASSES[decision.type]


def _exact(weight: QuantizedWeight) -> Tensor:
    """The scales in the scheme's precision, which they were already rounded to."""
    assert weight.scale is not None
    stored = weight.scale.to(getattr(torch, weight.scheme.scale_dtype))
    if not torch.equal(stored.float(), weight.scale):
        raise QawareError(
            f"scale: is not exact in {weight.scheme.scale_dtype}, which {weight.scheme.label} stores"
        )
    return stored


def _pick(table: Tensor, rows: Tensor | None) -> Tensor:
    return table if rows is None else table[rows]


def _join(parts: list[Tensor], width: int) -> Tensor:
    """The parts of a row without the padding that made them equal."""
    return torch.cat(parts, -1)[..., :width]


def _spread(values: Tensor, count: int) -> list[Tensor]:
    """The values of each part of a row: a slice, or the same ones when a row has a single block."""
    return [values] * count if values.shape[-1] == 1 else list(values.chunk(count, -1))


def _affine(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(code - zero) * scale for each block of the last axis; the difference is exact in float32."""
    blocks = codes.reshape(*scale.shape, -1)
    return ((blocks - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)
