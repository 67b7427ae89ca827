"""The key-value cache of a language model in a ``.pte``, in buffers that the runtime keeps from call to call.

ExecuTorch's LLM kernels (``llama::update_cache`` and ``llama::custom_sdpa``, in its wheel and in the LLM
builds of its Android and iOS libraries) write new keys in place and attend to what was written only. With
portable operators the whole cache is copied for each token: 2.6 ms of CPU time for one token of a 25 M model
with 256 places, 0.6 ms with the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qaware.exporters.generation import CacheSpec, StaticStep
from qaware.exporters.signature import first_tensor


class KernelCache:
    """Keys and values (1, tokens, heads, dim), as the kernels want them."""

    def __init__(self, tensors: Sequence[Tensor], start: Any) -> None:
        self.tensors, self.start = tensors, start

    def positions(self, count: int) -> Tensor:
        """Every place of the cache; the mask made of them is not used."""
        return torch.arange(self.tensors[0].shape[1])

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Write from the start of the step on; returns the whole tensors, (1, tokens, heads, dim)."""
        pair = self.tensors[2 * layer], self.tensors[2 * layer + 1]
        for held, new in zip(pair, (keys, values), strict=True):
            torch.ops.llama.update_cache(new.transpose(1, 2), held, self.start)
        return pair

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """(1, S, heads, dim) of a query (1, heads, S, dim), causal from the start of the step on."""
        attended: Tensor = torch.ops.llama.custom_sdpa(
            query.transpose(1, 2), keys, values, self.start, None, 0.0, True, scale
        )
        return attended


class KernelStep(nn.Module):
    """``forward(input_ids (1, S), positions (S,))`` to logits (1, S, V), by ExecuTorch's LLM kernels."""

    def __init__(self, module: Any, cache: CacheSpec) -> None:
        super().__init__()
        # Registers the operators.
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401

        self.module, self.length = module, cache.length
        self.names = _hold(self, [t.transpose(1, 2).contiguous() for t in cache.empty()])

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """One step; positions are those from the first on."""
        start = positions[0].item()
        torch._check(start >= 0)
        torch._check(start < self.length)
        held = [getattr(self, name) for name in self.names]
        return first_tensor(self.module.step(input_ids, positions, KernelCache(held, start)))


class PortableStep(nn.Module):
    """The same with the operators that every build of ExecuTorch has."""

    def __init__(self, module: Any, cache: CacheSpec) -> None:
        super().__init__()
        self.step = StaticStep(module)
        self.names = _hold(self, cache.empty())

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """One step."""
        logits: Tensor = self.step(input_ids, positions, *(getattr(self, name) for name in self.names))
        return logits


def _hold(step: nn.Module, tensors: Sequence[Tensor]) -> list[str]:
    names = [f"cache{i}" for i in range(len(tensors))]
    for name, tensor in zip(names, tensors, strict=True):
        step.register_buffer(name, tensor)
    return names
