"""Logits that are needed again: those of the float model, which every stage is compared with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qaware.metrics.windows import data_hash

MOST = 1 << 29
"""Bytes that are kept: the logits of 128 windows of 128 tokens and 8192 words."""


def remembered(predict: Callable[..., Tensor], most: int = MOST) -> Callable[..., Tensor]:
    """``predict`` that keeps the logits of the first inputs, and computes those of the others each time.

    Args:
        predict: tensors to logits, the same for the same tensors.
        most: bytes that are kept.

    Returns:
        A function with the same results, bit for bit, which nobody may change in place.
    """
    known: dict[str, Tensor] = {}
    size = 0

    def run(*tensors: Tensor) -> Tensor:
        nonlocal size
        key = data_hash(tensors)
        if key in known:
            return known[key]
        logits = predict(*tensors)
        if size + logits.nbytes <= most:
            size += logits.nbytes
            known[key] = logits
        return logits

    return run
