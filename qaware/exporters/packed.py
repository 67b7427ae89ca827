"""Weights that hold integers at their width and give what the converted weights give.

The modules engine keeps every integer in a byte, which torchao can compute with. A file should be as
small as the recipe promises, so these weights hold the same integers in bit planes: 4 bits are one
plane of 4, 3 bits a plane of 2 and one of 1, 7 bits planes of 4, 2 and 1; 8 bits stay int8.

A byte of a plane holds columns that are far apart (column c and column c + width / 2 for 4 bits)
rather than neighbours. Unpacking then reads and writes whole vectors: the compiled kernel of a
1024 x 1024 layer took 0.50 ms for one token, 1.7 ms with neighbours and 0.29 ms with plain floats.
"""

from __future__ import annotations

import abc
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.base import QuantizedWeight
from qaware.engines.weight_fake_quant import integer_dtype
from qaware.errors import QawareError
from qaware.scheme import Scheme

PLANES = (4, 2, 1)


def pack(data: Tensor, scheme: Scheme) -> dict[int, Tensor]:
    """int8 (rows, width) in the range of ``scheme`` to planes by their bits, the lowest bits first.

    Codes in a plane count from the smallest integer of the range, stretched ones, which are odd, by twos; 8
    bits stay the int8 they are.
    """
    if scheme.code_bits == 8:
        return {8: data.contiguous()}
    codes = ((data - scheme.range[0]) // (2 if scheme.is_stretched else 1)).to(torch.uint8)
    planes = {}
    for plane in (p for p in PLANES if scheme.code_bits & p):
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


class StoredWeight(nn.Module, abc.ABC):
    """One quantized weight; layers that share it share one copy in the file."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.scheme, (self.rows, self.width) = weight.scheme, weight.data.shape
        self.block = self.scheme.block(self.width)

    @abc.abstractmethod
    def integers(self) -> Tensor:
        """int8 (rows, width): what was packed."""

    @abc.abstractmethod
    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scales, float32 (rows, groups), and zero points, int8 of that shape or None."""

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """float32 (rows, width), or (*rows.shape, width) for the given rows only."""
        scale, zero = self.grid()
        values = self.integers().float().unflatten(-1, (scale.shape[1], -1))
        values = values if zero is None else values - zero.float().unsqueeze(-1)
        whole: Tensor = (values * scale.unsqueeze(-1)).flatten(-2)
        return whole if rows is None else whole[rows]

    def tensor(self, activation: str, dtype: torch.dtype) -> Tensor:
        """The weight of the converted layer, for model code that reads ``layer.weight`` itself."""
        scale, zero = self.grid()
        zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
        rounding = "int8_asym_per_token" if activation == "int8-dynamic" else None
        kind = (integer_dtype(self.scheme), (1, self.block), dtype, rounding)
        return cast(Tensor, IntxUnpackedToInt8Tensor(self.integers(), scale, zero, *kind))


class PackedWeight(StoredWeight):
    """A weight in bit planes."""

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight)
        planes = pack(weight.data, self.scheme)
        self.planes = tuple(planes)
        self.step = 2 if self.scheme.is_stretched else 1
        """From one integer to the next."""
        self.offset = 0 if 8 in planes else -self.scheme.range[0] / self.step
        """The code of zero, between two codes where the levels are stretched."""
        for plane, packed in planes.items():
            self.register_buffer(f"plane{plane}", packed)
        self.register_buffer("scale", exact_scale(weight))
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

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """As stored."""
        return self.scale.float(), self.zero_point

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """As of the weight's planes: scaled before they are joined."""
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


def exact_scale(weight: QuantizedWeight) -> Tensor:
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
