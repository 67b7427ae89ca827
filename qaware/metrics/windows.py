"""The fixed pieces of text that a language model is scored on, and what identifies them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.metrics.score import fingerprint_of


@dataclass(frozen=True, eq=False)  # == on tensors is elementwise; compare fingerprints instead
class Windows:
    """Token windows, each with the index from which on its tokens are scored.

    The tokens before that index are context only: they are what makes a sliding window (stride smaller
    than window) count every token once.
    """

    ids: tuple[Tensor, ...]
    """One 1-D int64 tensor of token ids for each window, on the CPU; lengths may differ."""
    first: tuple[int, ...]
    """For each window the index of its first scored token; at least 1, as token 0 has no prediction."""
    bytes: int | None
    """UTF-8 bytes of the scored text, for bits per byte; None when unknown."""
    tokenizer: str
    """What identifies the tokenizer, preferably a hash of its files; goes into the protocol as it is."""
    window: int
    """Most tokens that the model sees at once."""
    stride: int
    """Tokens between the starts of two windows; equal to ``window`` when they do not overlap."""
    bos: bool
    """Whether each window starts with a beginning-of-sequence token."""

    def __post_init__(self) -> None:
        if not self.ids:
            raise QawareError("windows: there are none to score; give more text or a shorter window")
        if len(self.ids) != len(self.first):
            raise QawareError(
                f"first: {len(self.first)} entries for {len(self.ids)} windows; give one for each"
            )
        for index, (ids, first) in enumerate(zip(self.ids, self.first, strict=True)):
            _check_window(index, ids, first)
        for key, value in (("window", self.window), ("stride", self.stride), ("bytes", self.bytes)):
            if value is not None and value < 1:
                raise QawareError(f"{key}: {value!r} must be at least 1")

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(len(ids) - first for ids, first in zip(self.ids, self.first, strict=True))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify `protocol`."""
        return fingerprint_of(self.protocol())

    def protocol(self) -> dict[str, Any]:
        """Everything that decides what is counted, as plain JSON values."""
        return {
            "data": data_hash((*self.ids, torch.tensor(self.first))),
            "tokenizer": self.tokenizer,
            "window": self.window,
            "stride": self.stride,
            "bos": self.bos,
            "normalizer": "token",
            "tokens": self.tokens,
        }

    def head(self, count: int) -> Windows:
        """The first ``count`` windows; how many bytes they are is not known."""
        return dataclasses.replace(self, ids=self.ids[:count], first=self.first[:count], bytes=None)

    @classmethod
    def from_batches(cls, batches: Iterable[Tensor], tokenizer: str = "unknown") -> Windows:
        """Each row of the (B, T) int64 ``batches`` becomes a window, scored from its second token on.

        Rows are copied. There is no mask here, so padding would be scored like text.

        Raises QawareError for batches of another shape or dtype, and when there are none.
        """
        rows: list[Tensor] = []
        for index, batch in enumerate(batches):
            if not isinstance(batch, Tensor) or batch.dim() != 2:
                raise QawareError(
                    f"batch {index}: {describe(batch)} is not a (batch, tokens) tensor of token ids"
                )
            rows += batch.detach().to("cpu", copy=True).unbind(0)
        longest = max((len(row) for row in rows), default=1)
        return cls(tuple(rows), (1,) * len(rows), None, tokenizer, longest, longest, False)


def data_hash(tensors: Iterable[Tensor]) -> str:
    """sha256 (hex) over dtype, shape and bytes of each tensor, so that no two splits of data collide."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        # Viewed as bytes because NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(value: object) -> str:
    """A value's shape and dtype, or its type when it is no tensor, for error messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _check_window(index: int, ids: Tensor, first: int) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype != torch.int64:
        raise QawareError(f"window {index}: {describe(ids)} must be a 1-D int64 tensor of token ids")
    if not 1 <= first < len(ids):
        raise QawareError(
            f"window {index}: first = {first} scores nothing of {len(ids)} tokens; "
            "it must be at least 1 and less than the length (drop windows of a single token)"
        )
