"""Weights as MLX holds them: affine groups of 32, 64 or 128 integers, each with a scale and a bias.

A row is one stream of bits in words of 32, the lowest bits of a word first, of codes that count from zero up.
A code stands for ``code * scale + bias``, so the bias is the smallest integer less the zero point, times the
scale (``mx.quantize`` of MLX documents the form). Wider groups are several of MLX's with the same scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaware.engines.base import QuantizedWeight
from qaware.scheme import Scheme

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
_ROWS = 1024
"""Packed at once, as each bit takes a byte on the way."""


def bits_of(scheme: Scheme) -> int:
    """Bits that a weight takes in the file."""
    return next(width for width in WIDTHS if scheme.stored_bits <= width)


def group_of(scheme: Scheme, width: int) -> int | None:
    """Weights of one group of MLX in a row of ``width``; None where the scheme's groups fill none."""
    return next((group for group in GROUPS if scheme.block(width) % group == 0), None)


def stored(weight: QuantizedWeight, is_table: bool) -> dict[str, Tensor]:
    """``weight``, ``scales`` and ``biases`` of one layer, by the names of ``mlx.nn.QuantizedLinear``.

    Args:
        weight: integers in groups that MLX has.
        is_table: of an embedding, which may be the head too. MLX computes on in the precision of its scales,
            so they are float32.

    Returns:
        uint32 (rows, width * bits / 32), and twice (rows, width / group): in the scheme's precision where
        scales and biases are exact there, else float32.
    """
    width = weight.data.shape[1]
    bits, group = bits_of(weight.scheme), group_of(weight.scheme, width)
    assert weight.scale is not None
    assert group is not None
    low = -(2 ** (bits - 1))
    zero = 0 if weight.zero_point is None else weight.zero_point.float()
    scales, biases = weight.scale, weight.scale * (low - zero)
    dtype = torch.float32 if is_table else getattr(torch, weight.scheme.scale_dtype)
    if not all(torch.equal(values.to(dtype).float(), values) for values in (scales, biases)):
        dtype = torch.float32
    repeats = width // group // scales.shape[1]
    grid = {"scales": scales, "biases": biases}
    spread = {key: values.to(dtype).repeat_interleave(repeats, 1) for key, values in grid.items()}
    return {"weight": pack(weight.data, bits), **spread}


def pack(data: Tensor, bits: int) -> Tensor:
    """int8 (rows, width), a multiple of 32, to uint32 (rows, width * bits / 32)."""
    parts = [_stream(part.numpy(), bits) for part in data.split(_ROWS)]
    return torch.from_numpy(np.concatenate(parts).view("<u4"))


def _stream(integers: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    codes = (integers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")


def extra_bytes(weight: QuantizedWeight, parts: dict[str, Tensor]) -> int:
    """What it costs that MLX's groups, in ``parts`` as of ``stored``, are smaller than the scheme's."""
    assert weight.scale is not None
    scales = parts["scales"]
    return 2 * scales.element_size() * (scales.numel() - weight.scale.numel())
