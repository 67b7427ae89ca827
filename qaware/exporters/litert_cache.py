"""Steps of a language model with fixed sizes: keys and values come in and go out whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qaware.exporters.generation import CacheSpec, attends
from qaware.exporters.signature import first_tensor

PREFILL, DECODE = "prefill", "decode"
_UNSEEN = -1e9
"""Added to the score of a later token; what its softmax gives is zero."""


class SliceCache:
    """Tensors (1, heads, length, dim) of which each step replaces a slice."""

    def __init__(self, tensors: list[Tensor], start: Tensor) -> None:
        self.tensors, self.start = tensors, start

    def positions(self, count: int) -> Tensor:
        """Every place of the cache."""
        return torch.arange(self.tensors[0].shape[2])

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Replace the places of the step."""
        from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice

        zero = torch.zeros_like(self.start)
        for index, new in ((2 * layer, keys), (2 * layer + 1, values)):
            at = [zero, zero, self.start, zero]
            self.tensors[index] = dynamic_update_slice(self.tensors[index], new, at)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]


class GroupedCache(SliceCache):
    """Attends to keys that several heads share as they are: LiteRT takes longer to repeat them than for all
    else, 18 of 20 ms for a token of a 26 M model with 256 places."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """(1, S, heads, dim) of a query (1, heads, S, dim), causal from the start of the step on."""
        _, heads, count, dim = query.shape
        shared, length = keys.shape[1:3]
        after = torch.arange(length)[None, :] > (self.start + torch.arange(count))[:, None]
        scores = query.reshape(1, shared, -1, dim) @ keys.transpose(2, 3) * scale
        seen = scores.reshape(1, heads, count, length) + torch.where(after, _UNSEEN, 0.0)
        attended = seen.softmax(-1).reshape(1, shared, -1, length) @ values
        return attended.reshape(1, heads, count, -1).transpose(1, 2)


class SliceStep(nn.Module):
    """``forward(input_ids (1, S), start (1,), *cache)`` to logits (1, S, V) and the cache, tensors as of
    ``CacheSpec.empty``; ids and start are int64."""

    def __init__(self, module: Any, kind: type[SliceCache]) -> None:
        super().__init__()
        self.module, self.kind = module, kind

    def forward(self, input_ids: Tensor, start: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """One step."""
        positions = start + torch.arange(input_ids.shape[1])
        held = self.kind(list(cache), start[0])
        logits = first_tensor(self.module.step(input_ids, positions, held))
        return logits, *held.tensors


def cached_signatures(
    module: nn.Module, cache: CacheSpec, longest: int
) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Both functions of a file: ``longest`` tokens at once, and one."""
    step = SliceStep(module, GroupedCache if attends(module) else SliceCache)
    start = torch.zeros(1, dtype=torch.int64)
    return {
        name: (step, (torch.zeros(1, count, dtype=torch.int64), start, *cache.empty()))
        for name, count in ((PREFILL, longest), (DECODE, 1))
    }
