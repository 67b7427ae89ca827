"""Tokens from an artifact, one after the other: greedy, or drawn from its distribution."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from qaware.errors import QawareError


class Stepping(Protocol):
    """A runner of a language model; ``length`` is 0 where it has no key-value cache."""

    length: int
    most: int

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Logits (1, T, V) of a whole text, int64 (1, T)."""

    def step(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits (1, S, V) of the tokens from ``start`` on."""


def decode(
    runner: Stepping,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """Tokens that follow a prompt, until one of ``stop``, which is the last, or ``max_new_tokens``.

    Args:
        runner: with a key-value cache the prompt is read once, in parts of ``runner.most`` tokens, and each
            further token alone; without one the whole text is read for every token.
        input_ids: int64 (1, T), T at least 1.
        max_new_tokens: at least 1.
        stop: token ids.
        temperature: 0 takes the likeliest token (the first of equals); else logits are divided by it.
        top_k: draw from so many likeliest tokens only; 0 for all.
        seed: of the draws.

    Raises:
        QawareError: an empty prompt, an option out of its range, or a text longer than the runner takes.
    """
    _require(runner, input_ids, max_new_tokens, temperature, top_k)
    if not -(2**63) <= seed < 2**64:
        raise QawareError(f"seed: {seed} must be a number of 64 bits")
    choose = _chooser(temperature, top_k, seed)
    forward = _cached(runner) if runner.length else _uncached(runner)
    text = input_ids
    for _ in range(max_new_tokens):
        token = choose(forward(text)[0, -1].float())
        yield token
        if token in stop:
            return
        text = torch.cat([text, torch.tensor([[token]])], 1)


def in_steps(runner: Stepping, singly: int = 8) -> Callable[..., Tensor]:
    """A runner with a cache as one of whole texts (1, T) that goes through them as ``decode`` does: the first
    half at once, then ``singly`` tokens one by one, and the others at once."""

    def run(*tensors: Tensor) -> Tensor:
        ids = tensors[0]
        length, half = ids.shape[1], max(1, ids.shape[1] // 2)
        alone = range(half, min(half + singly, length))
        ends = [0, half, *(i + 1 for i in alone), *([length] if alone and alone[-1] + 1 < length else [])]
        pairs = itertools.pairwise(ends)
        return torch.cat([runner.step(ids[:, start:end], start) for start, end in pairs], 1)

    return run


def _cached(runner: Stepping) -> Callable[[Tensor], Tensor]:
    """Logits of a text of which all but the last tokens were seen in earlier calls."""
    seen = 0

    def forward(text: Tensor) -> Tensor:
        nonlocal seen
        logits = torch.empty(0)
        while seen < text.shape[1]:
            part = text[:, seen : seen + runner.most]
            logits = runner.step(part, seen)
            seen += part.shape[1]
        return logits

    return forward


def _uncached(runner: Stepping) -> Callable[[Tensor], Tensor]:
    return lambda text: runner(text)


def _chooser(temperature: float, top_k: int, seed: int) -> Callable[[Tensor], int]:
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> int:
        kept = torch.topk(logits, min(top_k, len(logits))) if top_k else torch.sort(logits, descending=True)
        # The largest is taken off first, as a small temperature would make it infinite.
        weights = ((kept.values - kept.values[0]).double() / temperature).softmax(0)
        return int(kept.indices[torch.multinomial(weights, 1, generator=generator)])

    return draw


def _require(runner: Any, input_ids: Tensor, count: int, temperature: float, top_k: int) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise QawareError(f"input_ids: shape is {tuple(input_ids.shape)}, must be (1, 1 or more)")
    for key, value, low in (
        ("max_new_tokens", count, 1),
        ("temperature", temperature, 0),
        ("top_k", top_k, 0),
    ):
        if not value >= low:  # NaN too
            raise QawareError(f"{key}: {value} must be at least {low}")
    limit, total = runner.length or runner.most, input_ids.shape[1] + count - 1
    if total > limit:
        held = "its cache holds" if runner.length else "it takes"
        raise QawareError(
            f"max_new_tokens: a prompt of {input_ids.shape[1]} tokens and {count} more are {total} to read, "
            f"and {held} {limit}; ask for fewer, or export with a larger "
            f"{'cache_length' if runner.length else 'block_size'}"
        )
