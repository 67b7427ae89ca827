"""``qaware::product``: activations, as int8, times packed integers, with a kernel of its own in AOTInductor.

Torch's CPU kernels either expand int4 weights to floats (``packed.py``), or round activations to bfloat16
(``_weight_int4pack_mm_for_cpu``), or know no groups (onednn). This operator multiplies the integers
themselves, four at a time, and its sums are exact. Inductor writes its code (``aoti_product.h``) into the
library that it compiles, so that the file needs nothing of qaware where it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qaware.engines.base import ActivationRange
from qaware.exporters.aoti_tokens import integers

FEATURES = ("avx512f", "avx512_vnni")
"""Of the CPU, that the kernel needs; those with the second have the rest of AVX512 that it uses."""
LANES = 16
"""Rows of a weight that are stored together."""
WIDTHS = (1, 2, 4, 8)
"""Bits of a code; several fill a byte."""
_SCHEMA = (
    "product(Tensor x, Tensor codes, Tensor weight_scale, Tensor? weight_zero, Tensor? sums, int rows, "
    "int bits, int group, int offset, int step, str activation, float scale, int zero) -> Tensor"
)
_LIBRARY = torch.library.Library("qaware", "DEF")
_LIBRARY.define(_SCHEMA)


def columns(bits: int) -> int:
    """Columns of a row that are stored together."""
    return 4 * (8 // bits)


def arrange(codes: Tensor, bits: int) -> Tensor:
    """uint8 (rows, width) below ``2**bits`` to uint8 (blocks, width * bits / 32, 64), as the kernel reads it.

    The rows are filled up with zeros to a multiple of 16; the width must be one of ``columns(bits)``.
    """
    blocks = _by_rows(codes).view(-1, LANES, codes.shape[1] // columns(bits), 8 // bits, 4)
    packed = torch.zeros_like(blocks[..., 0, :])
    for part in range(8 // bits):
        packed |= blocks[..., part, :] << (part * bits)
    return packed.transpose(1, 2).flatten(2).contiguous()


def by_lane(values: Tensor) -> Tensor:
    """(rows, groups) to (blocks, groups, 16), filled up with zeros."""
    return _by_rows(values).view(-1, LANES, values.shape[1]).transpose(1, 2).contiguous()


def _by_rows(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % LANES))


def codes_of(packed: Tensor, bits: int, rows: Tensor | None = None) -> list[Tensor]:
    """The parts of each row: ``8 / bits`` of float32 (..., width * bits / 32, 4), for the given rows (int64,
    any shape) or all that are stored."""
    lanes = packed.unflatten(2, (LANES, 4))
    picked = lanes.transpose(1, 2).flatten(0, 1) if rows is None else lanes[rows // LANES, :, rows % LANES]
    mask = 2**bits - 1
    # Inductor's vector code is fast for a mask and an exact product, slow for a shift of bytes.
    return [(picked & (mask << shift)).float() * 2.0**-shift for shift in range(0, 8, bits)]


def _compute(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    sums: Tensor | None,
    rows: int,
    bits: int,
    group: int,
    offset: int,
    step: int,
    activation: str,
    scale: float,
    zero: int,
) -> Tensor:
    """What the kernel computes, in float64: (tokens, rows) in float32.

    Args:
        x: float32 (tokens, width).
        codes: of the weight, see ``arrange``.
        weight_scale: float (blocks, groups, 16).
        weight_zero: int8, as ``weight_scale``; None for symmetric weights.
        sums: float32 (rows,), of the weight's values; for activations with zero points, all but ``none``.
        rows: of the weight.
        bits: of a code: 1, 2, 4 or 8.
        group: columns that share a scale.
        offset: twice the code of zero, as levels may lie half between two codes.
        step: from one code to the next, in scales.
        activation: how ``x`` is rounded: ``none``, to 16 bits for each token, ``int8-dynamic`` or
            ``int8-static``.
        scale: of a static range.
        zero: its zero point.
    """
    static = ActivationRange(scale, zero) if activation == "int8-static" else None
    digits, scales, zeros = integers(x, activation, static)
    parts = torch.stack(codes_of(codes, bits), -2).flatten(1).double().unflatten(1, (-1, group))
    shift = offset / 2 if weight_zero is None else offset / 2 + _rows(weight_zero)
    weight = ((parts - shift) * _rows(weight_scale) * step).flatten(1)[:rows]
    values = digits[0].double() if len(digits) == 1 else digits[0].double() * 256 + digits[1]
    if zeros is not None:
        values = values - zeros.unsqueeze(1)
    product: Tensor = (values @ weight.T) * scales.double().unsqueeze(1)
    return product.float()


def _rows(lanes: Tensor) -> Tensor:
    """(blocks, groups, 16) to float64 (rows, groups, 1)."""
    return lanes.transpose(1, 2).flatten(0, 1).double().unsqueeze(-1)


def _shape(x: Tensor, *rest: Any) -> Tensor:
    rows = rest[4]
    return x.new_empty((x.shape[0], rows))


_LIBRARY.impl("product", _compute, "CPU")
torch.library.register_fake("qaware::product", _shape, lib=_LIBRARY)
