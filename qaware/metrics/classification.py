"""Score a classifier, torch or any runtime's, on fixed batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.metrics.collect import (
    Begun,
    Gather,
    Record,
    Shard,
    add_up,
    computes_elsewhere,
    record,
    run,
    start,
)
from qaware.metrics.hub import compute_extra, load_extra
from qaware.metrics.score import Score
from qaware.metrics.windows import data_hash, describe

Predict = Callable[..., Tensor]
"""The tensors of one batch as positional arguments -> logits (B, C) of any float dtype, on any device."""


def score_classification(
    predict: Predict,
    inputs: Sequence[tuple[Tensor, ...]],
    labels: Sequence[Tensor],
    reference: Predict | None = None,
    *,
    extra: Sequence[str] = (),
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    on_batch: Callable[[], None] | None = None,
) -> Score:
    """Accuracy and cross-entropy (nats per sample) of ``predict`` on batches; beside a ``reference`` also
    KL, top-1 agreement and SQNR.

    inputs: for each batch the tuple of tensors that ``predict`` is called with.
    labels: for each batch its (B,) integer classes.
    reference, rank, world, gather, on_batch, extra: as in `score_language`, with batches for windows and
        samples for tokens. Batches stay whole, as a dynamically quantized model may depend on them; losses
        and the interval are per sample.

    Raises QawareError, naming the batch, for inputs, labels or logits of a wrong shape or dtype, and for
    logits that are not finite.
    """
    shard = Shard(rank, world, gather)
    _check(inputs, labels)
    metrics = load_extra(extra)

    def one(index: int) -> Begun:
        return _score_batch(predict, reference, inputs[index], labels[index], index, keep=bool(metrics))

    records = shard.collect(one, len(inputs), on_batch, computes_elsewhere(predict))
    predictions = list(chain.from_iterable(item.predictions for item in records))
    targets = list(chain.from_iterable(item.tolist() for item in labels))
    values = compute_extra(metrics, predictions, targets) if metrics else {}
    score = add_up(records, _protocol(inputs, labels), values)
    hits = tuple(chain.from_iterable(item.hits for item in records))
    return dataclasses.replace(score, accuracy=sum(hits) / score.count, hits=hits, sqnr=_sqnr(records))


def _score_batch(
    predict: Predict,
    reference: Predict | None,
    batch: tuple[Tensor, ...],
    labels: Tensor,
    index: int,
    *,
    keep: bool,
) -> Begun:
    """Start a batch; what waits for its logits and returns what measures them."""
    targets = labels.long()
    started = start(predict, batch)

    def finish() -> Callable[[], Record]:
        logits, other, seconds = run(f"batch {index}", started, reference, batch, (len(targets),), targets)

        def measured() -> Record:
            item = record(index, logits, targets, other, seconds, whole=False, keep=keep)
            if other is None:
                return item
            signal = other.detach().cpu().double()
            noise = signal - logits.detach().cpu().double()
            return dataclasses.replace(item, signal=_energy(signal), noise=_energy(noise))

        return measured

    return finish


def _energy(values: Tensor) -> float:
    return float(values.square().sum())


def _sqnr(records: Sequence[Record]) -> float | None:
    """Over the logits of all records, in dB."""
    if any(item.signal is None or item.noise is None for item in records):
        return None
    signal = math.fsum(item.signal or 0.0 for item in records)
    noise = math.fsum(item.noise or 0.0 for item in records)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _check(inputs: Sequence[tuple[Tensor, ...]], labels: Sequence[Tensor]) -> None:
    if not inputs or len(inputs) != len(labels):
        raise QawareError(
            f"labels: {len(labels)} for {len(inputs)} batches of inputs; give one for each, and at least one"
        )
    for index, (batch, classes) in enumerate(zip(inputs, labels, strict=True)):
        if not isinstance(batch, tuple) or not all(isinstance(tensor, Tensor) for tensor in batch):
            raise QawareError(
                f"batch {index}: inputs are {describe(batch)}, need a tuple of tensors, e.g. (images,)"
            )
        integer = isinstance(classes, Tensor) and not (classes.is_floating_point() or classes.is_complex())
        if not integer or classes.dtype == torch.bool or classes.dim() != 1 or len(classes) == 0:
            raise QawareError(
                f"batch {index}: labels are {describe(classes)}, need (B,) integers with B >= 1"
            )


def _protocol(inputs: Sequence[tuple[Tensor, ...]], labels: Sequence[Tensor]) -> dict[str, Any]:
    """What is counted. The hash covers how samples are batched, and labels whatever their integer dtype."""
    tensors = (t for batch, classes in zip(inputs, labels, strict=True) for t in (*batch, classes.long()))
    return {
        "data": data_hash(tensors),
        "normalizer": "sample",
        "batches": len(inputs),
        "samples": sum(len(item) for item in labels),
    }
