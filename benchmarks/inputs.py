"""What every contender is given: sizes, tokens and images, without torch, which takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
PREFILL = 128
"""Tokens that are read at once, and that the key-value cache holds when the next one is made."""


@dataclass(frozen=True)
class Size:
    """How large both models are."""

    hidden: int
    feedforward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    channels: tuple[int, ...]
    """Of the convolutions; each step up halves the height and the width."""
    image: int
    """Height and width."""

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.hidden // self.heads


SIZES = {
    "full": Size(512, 1408, 6, 8, 4, 8192, 256, (32, 32, 64, 64, 128, 128, 256, 256), 64),
    "tiny": Size(64, 96, 2, 2, 1, 256, 192, (8, 8, 16), 16),
}
"""26.1 million parameters and 1.18 million; ``tiny`` only shows that everything runs."""


def tokens(vocabulary: int) -> Array:
    """int64 (1, PREFILL + 1): the text that is read, and behind it the token that decoding starts with."""
    drawn = np.random.default_rng(0).integers(1, vocabulary, (1, PREFILL + 1))
    return drawn.astype(np.int64)


def texts(size: Size) -> tuple[Array, Array]:
    """The text and the token behind it, int64 (1, PREFILL) and (1, 1)."""
    ids = tokens(size.vocabulary)
    return np.ascontiguousarray(ids[:, :PREFILL]), np.ascontiguousarray(ids[:, PREFILL:])


def empty_past(size: Size) -> list[Array]:
    """Keys and values of no tokens, float32 (1, kv_heads, 0, head_width), two for each layer."""
    return [np.zeros((1, size.kv_heads, 0, size.head_width), np.float32)] * (2 * size.layers)


def past_names(size: Size) -> list[str]:
    """Of the inputs that hold keys and values."""
    return [f"past{i}" for i in range(2 * size.layers)]


def images(count: int, size: int) -> Array:
    """float32 (count, 3, size, size), of mean 0 and deviation 1."""
    return np.random.default_rng(1).standard_normal((count, 3, size, size)).astype(np.float32)
