"""Activations as integers, each token by itself: those of the scheme, or 16 bits in two digits of 8."""

from __future__ import annotations

import torch
from torch import Tensor

from qaware.engines.base import ActivationRange
from qaware.exporters.packed_layers import integers_per_token, static_integers

_DIGIT = 256
_LARGEST = 127 * _DIGIT + 127
"""What two digits from -128 to 127 hold on both sides of zero."""
_SMALLEST = 2.0**-100
"""For tokens of zeros."""


def integers(
    x: Tensor, activation: str, static: ActivationRange | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Digits, scales and zero points of each token.

    Args:
        x: float32 (tokens, width).
        activation: of the scheme.
        static: its range, for ``int8-static``.

    Returns:
        int8 (digits, tokens, width), two digits for ``none``; float32 (tokens,); int32 (tokens,) or None.
    """
    if activation == "int8-dynamic":
        rounded, (_, scale, zero, *_) = integers_per_token(x)
        return rounded.unsqueeze(0), scale.flatten(), zero.flatten().to(torch.int32)
    if static is None:
        return *two_digits(x), None
    tokens = (x.shape[0],)
    zero = torch.full(tokens, static.zero_point, dtype=torch.int32)
    rounded = static_integers(x, static).to(torch.int8)
    return rounded.unsqueeze(0), torch.full(tokens, static.scale), zero


def two_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of 16 bits as int8 (2, tokens, width), and the scale of each token, float32 (tokens,)."""
    scale = x.abs().amax(1).clamp_min(_SMALLEST) / _LARGEST
    rounded = (x / scale.unsqueeze(1)).round()
    high = ((rounded + _DIGIT // 2) / _DIGIT).floor()
    return torch.stack([high, rounded - high * _DIGIT]).to(torch.int8), scale
