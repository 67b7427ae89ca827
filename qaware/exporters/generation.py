"""Key-value caches: what a language model needs in order to be exported as one that generates.

A module takes part by three members; ``qaware.lm.CausalLM`` has them, and any other module may:

- ``context_length``: the most tokens that it sees, an int, or None for no limit;
- ``cache_shapes(length)``: ``(heads, dim)`` of the keys and of the values of each layer, keys first, for
  texts of up to ``length`` tokens; a QawareError when it cannot;
- ``step(input_ids, positions, cache)``: logits (1, S, V) of int64 ids (1, S) at int64 positions (S,), where
  each attention layer calls ``cache.update(keys, values, layer)`` with float (1, heads, S, dim), as those of
  `transformers` do, and attends to what that returns; ``cache.positions(S)`` are their places in the text.
  Where the cache has ``attend(query, keys, values, scale)``, a layer may leave the attention to it: a runtime
  may have one kernel for it. ``attends`` finds out whether a module does.

Runtimes hold the cache differently: in tensors of a fixed size that are written in place (StaticStep), or
in tensors that grow with each call (GrowingStep).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qaware.errors import QawareError
from qaware.exporters.signature import Signature, first_tensor

CAPPED = 1024
"""Tokens of a cache whose length nobody chose: each one costs memory, and time in every step."""


class Cache(Protocol):
    """What ``step`` is given."""

    def positions(self, count: int) -> Tensor:
        """Places of the keys that ``update`` returns in a step of ``count`` tokens, int64 (keys,)."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **more: Any) -> tuple[Any, Any]:
        """Store those of new tokens and return all, each (1, heads, keys, dim)."""


class Decoder(Protocol):
    """A module that can be exported with a key-value cache."""

    @property
    def context_length(self) -> int | None:
        """The most tokens that it sees."""

    def cache_shapes(self, length: int) -> list[tuple[int, int]]:
        """``(heads, dim)`` of the keys and values of each layer, for texts of up to ``length`` tokens.

        Raises:
            QawareError: it cannot compute with such a cache.
        """

    def step(self, input_ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits (1, S, V)."""


@dataclass(frozen=True)
class CacheSpec:
    """The size of a key-value cache."""

    length: int
    """The most tokens that it holds."""
    shapes: tuple[tuple[int, int], ...]
    """``(heads, dim)``: keys and values of the first layer, of the second, ..."""

    def empty(self, tokens: int | None = None) -> list[Tensor]:
        """Zeros, float32 (1, heads, tokens, dim) for each shape; ``length`` tokens unless told."""
        count = self.length if tokens is None else tokens
        return [torch.zeros(1, heads, count, dim) for heads, dim in self.shapes]


def cache_of(module: Any, signature: Signature, length: int | None = None) -> CacheSpec | None:
    """The cache with which ``module`` is exported; None for a module that has none, or cannot.

    Args:
        module: of any kind.
        signature: of the exported model.
        length: tokens that the cache holds; default the model's context, at most 1024 or what the signature
            allows.

    Raises:
        QawareError: ``length`` is more than the model sees, or less than the signature promises.
    """
    if why_no_cache(module, signature, length) is not None:
        return None
    length = _length(module, signature, length)
    return CacheSpec(length, tuple(module.cache_shapes(length)))


def why_no_cache(module: Any, signature: Signature, length: int | None = None) -> str | None:
    """Why ``module`` is exported without a key-value cache; None when it gets one.

    Raises:
        QawareError: as ``cache_of``.
    """
    if not hasattr(module, "step") or not hasattr(module, "cache_shapes"):
        return "the module has no step(input_ids, positions, cache)"
    spec = signature.inputs[0]
    if len(signature.inputs) != 1 or spec.dtype != "int64" or len(spec.shape) != 2 or spec.shape[0] != 1:
        return f"its inputs are {[(s.dtype, s.shape) for s in signature.inputs]}, not one row of token ids"
    wanted = _length(module, signature, length)
    try:
        module.cache_shapes(wanted)
    except QawareError as error:
        return str(error)
    return None


def _length(module: Any, signature: Signature, wanted: int | None) -> int:
    longest, context = signature.longest, module.context_length
    if wanted is None:
        return max(longest, CAPPED if context is None else min(context, CAPPED))
    if wanted < longest or (context is not None and wanted > context):
        raise QawareError(
            f"cache_length: {wanted} must be {longest} (the longest input) to {context or 'any number'} "
            "(the model's context)"
        )
    return wanted


def attends(module: Any) -> bool:
    """Whether every layer of a decoder leaves its attention to a cache that can; tried on two tokens."""
    cache, device = _Attending(), next((p.device for p in module.parameters()), torch.device("cpu"))
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            module.step(ids, torch.arange(2, device=device), cache)
    except QawareError:  # an attention that is no plain one
        return False
    return cache.updated == cache.attended


class _Attending:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.updated = self.attended = 0

    def positions(self, count: int) -> Tensor:
        return torch.arange(count)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        self.updated += 1
        return keys, values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        self.attended += 1
        return query.transpose(1, 2)


class StaticCache:
    """Tensors of a fixed length, written in place; later places hold what is not seen yet, or stale."""

    def __init__(self, tensors: Sequence[Tensor], at: Tensor) -> None:
        self.tensors, self.at = tensors, at

    def positions(self, count: int) -> Tensor:
        """Every place of the cache."""
        return torch.arange(self.tensors[0].shape[2], device=self.at.device)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Write at the positions of the step."""
        pair = self.tensors[2 * layer], self.tensors[2 * layer + 1]
        for held, new in zip(pair, (keys, values), strict=True):
            held.index_copy_(2, self.at, new.to(held.dtype))
        return pair[0].to(keys.dtype), pair[1].to(values.dtype)


class GrowingCache:
    """Tensors to which each step appends."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.past = past
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def positions(self, count: int) -> Tensor:
        """From the first token on."""
        return torch.arange(self.past[0].shape[2] + count, device=self.past[0].device)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Append."""
        past = self.past[2 * layer], self.past[2 * layer + 1]
        self.present[layer] = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        return self.present[layer]


class StaticStep(nn.Module):
    """``forward(input_ids (1, S), positions (S,), *cache)`` to logits (1, S, V); the cache, tensors as of
    ``CacheSpec.empty``, is written in place."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, positions: Tensor, *cache: Tensor) -> Tensor:
        """One step."""
        return first_tensor(self.module.step(input_ids, positions, StaticCache(cache, positions)))


class GrowingStep(nn.Module):
    """``forward(input_ids (1, S), *past (1, heads, P, dim))`` to ``(logits (1, S, V), *present)``, where
    present has P + S tokens; the positions of the step are P to P + S - 1."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """One step."""
        cache, seen = GrowingCache(past), past[0].shape[2]
        positions = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)
        logits = first_tensor(self.module.step(input_ids, positions, cache))
        return logits, *(tensor for layer in sorted(cache.present) for tensor in cache.present[layer])


class CachedRunner:
    """An artifact with a key-value cache on its runtime.

    Args:
        length: the most tokens that the cache holds.
        most: the most tokens of one step; those of the signature, for which memory is planned.
        step: ``(input_ids (1, S), start)`` to float32 logits (1, S, V): what is held from ``start`` on is
            forgotten, what is before it is attended to.
    """

    def __init__(self, length: int, most: int, step: Callable[[Tensor, int], Tensor]) -> None:
        self.length, self.most = length, most
        self._step = step

    def __call__(self, *tensors: Tensor) -> Tensor:
        """A whole text: logits float32 (1, T, V) of int64 ids (1, T)."""
        return self._step(tensors[0], 0)

    def step(self, input_ids: Tensor, start: int) -> Tensor:
        """Go on with the tokens at ``start``, after those that earlier calls gave.

        Raises:
            QawareError: the tokens do not fit into the cache, or are too many for one step.
        """
        count = input_ids.shape[1]
        if count > self.most:
            raise QawareError(f"step: {count} tokens at once, the most are {self.most}; give them in parts")
        if start < 0 or start + count > self.length:
            raise QawareError(
                f"step: tokens {start} to {start + count} do not fit into a cache of {self.length}; "
                "export with a larger cache_length"
            )
        return self._step(input_ids, start)
