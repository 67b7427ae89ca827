"""The arithmetic on logits, in float64, that every score and every `evaluate` script here shares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 2**17
"""Logits turned into float64 at a time, unless one row has more: 1 MiB stays in the caches of a core, so that
nothing is fetched from memory again."""


class Rows(NamedTuple):
    """Measurements of N rows of logits, one entry a row, on the CPU."""

    nll: Tensor
    """(N,) float64, nats."""
    predicted: Tensor
    """(N,) int64, argmax of the logits (the lowest index among equals)."""
    kl: Tensor | None
    """(N,) float64, KL(reference || this) in nats; None without a reference."""
    agree: Tensor | None
    """(N,) bool, whether the reference has the same argmax; None without a reference."""


def measure(logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> Rows:
    """Measure (N, V) ``logits`` of any float dtype against (N,) int64 ``targets``.

    ``reference`` holds the float model's (N, V) logits, on any device. Everything must be finite.
    """
    parts = [
        _measure(logits[rows], targets[rows], None if reference is None else reference[rows])
        for rows in _chunks(*logits.shape)
    ]
    nll, predicted, kl, agree = zip(*parts, strict=True)
    if reference is None:
        return Rows(torch.cat(nll), torch.cat(predicted), None, None)
    return Rows(torch.cat(nll), torch.cat(predicted), torch.cat(kl), torch.cat(agree))


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float64, whatever float dtype comes in.

    In bfloat16 the result itself would keep 3 significant digits, and a sum over a text fewer.
    """
    return torch.log_softmax(_float64(logits), dim=-1)


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) in nats of each row: (N, V), (N, V) -> (N,) float64."""
    return _kl(log_probs(reference), log_probs(logits))


def same_top1(reference: Tensor, logits: Tensor) -> Tensor:
    """Whether two rows of logits have the same argmax: (N, V), (N, V) -> (N,) bool."""
    return reference.argmax(-1) == logits.argmax(-1)


def perplexity(nats: float) -> float:
    """exp(nats), infinite where that overflows a float64 (above 709.78 nats)."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _measure(logits: Tensor, targets: Tensor, reference: Tensor | None) -> tuple[Tensor, ...]:
    mine = log_probs(logits)
    nll = -mine.gather(-1, targets.to(mine.device).unsqueeze(-1)).squeeze(-1)
    # argmax of the logits themselves: log_probs rounds, and so makes ties that the model did not have.
    predicted = logits.argmax(-1).cpu()
    if reference is None:
        return nll.cpu(), predicted, torch.empty(0), torch.empty(0)
    kl = _kl(log_probs(reference).to(mine.device), mine)
    return nll.cpu(), predicted, kl.cpu(), reference.argmax(-1).cpu() == predicted


def _kl(reference: Tensor, mine: Tensor) -> Tensor:
    return (reference.exp() * (reference - mine)).sum(-1)


def _float64(logits: Tensor) -> Tensor:
    # Apple's GPU has no float64; CPU and CUDA do.
    here = logits if logits.device.type in ("cpu", "cuda") else logits.cpu()
    return here.double()


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))
