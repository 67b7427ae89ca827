"""One step of the language model as the peers' converters are given it: tensors in, tensors out.

Past keys and values are inputs, and what comes out beside the logits is those of the new tokens only. So a
peer neither copies the whole cache into its outputs nor appends to it: what a loop around it would have to
do, one row into each tensor, is not timed, in the peer's favour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import Size


class _Past:
    """What `transformers` takes for a cache."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.past = past
        self.new: list[Tensor] = []

    def positions(self, count: int) -> Tensor:
        return torch.arange((self.past[0].shape[2] if self.past else 0) + count)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        self.new += [keys, values]
        if not self.past:
            return keys, values
        return torch.cat([self.past[2 * layer], keys], 2), torch.cat([self.past[2 * layer + 1], values], 2)


class Step(nn.Module):
    """``forward(input_ids (1, S), *past (1, heads, P, dim))`` to ``(logits (1, S, V), *new)``: keys and
    values of each layer in turn, new (1, heads, S, dim). Without past tensors the text begins."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """One step."""
        cache = _Past(past)
        seen = past[0].shape[2] if past else 0
        at = torch.arange(seen, seen + input_ids.shape[1])
        return self.model.step(input_ids, at, cache), *cache.new


def empty(size: Size, count: int) -> list[Tensor]:
    """Zeros for ``count`` past tokens, float32 (1, kv_heads, count, head_width), two for each layer."""
    return [torch.zeros(1, size.kv_heads, count, size.head_width) for _ in range(2 * size.layers)]


def new_names(size: Size) -> list[str]:
    """Of the outputs that follow ``logits``."""
    return [f"new{i}" for i in range(2 * size.layers)]
