"""Score a language model, torch or any runtime's, on fixed windows of text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

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
from qaware.metrics.nats import perplexity
from qaware.metrics.score import Score
from qaware.metrics.windows import Windows

Predict = Callable[[Tensor], Tensor]
"""Token ids (1, T) int64 on the CPU -> logits (1, T, V) of any float dtype, on any device."""


def score_language(
    predict: Predict,
    windows: Windows,
    reference: Predict | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    on_window: Callable[[], None] | None = None,
    extra: Sequence[str] = (),
) -> Score:
    """Nats per token of ``predict`` on ``windows``, and everything that goes with it.

    Row t of the logits predicts token t + 1, as causal models do; nothing is shifted by the caller. The
    model should be in eval mode; gradients are off. Losses are float64 from the log-softmax on.

    reference: the float model. With it the score has ``kl`` and ``top1``; it runs on every window, too.
    rank, world: this process scores windows rank, rank + world, ... The result is the same, to the last
        bit, on every rank and for every world.
    gather: turns this rank's list of records into the flat list of all ranks' records; by default
        torch.distributed.all_gather_object. All ranks must call, and all fail if one does.
    on_window: called after each window that this rank has scored.
    extra: names or paths of `evaluate` metrics; they get argmax predictions and target tokens, as ints.

    Raises QawareError, naming the window, for logits of a wrong shape or dtype, or that are not finite.
    """
    shard = Shard(rank, world, gather)
    metrics = load_extra(extra)  # before the model runs: a misspelled name must not cost an hour

    def one(index: int) -> Begun:
        return _score_window(predict, reference, windows, index, keep=bool(metrics))

    records = shard.collect(one, len(windows.ids), on_window, computes_elsewhere(predict))
    predictions = [token for item in records for token in item.predictions]
    values = compute_extra(metrics, predictions, _targets(windows)) if metrics else {}
    score = add_up(records, windows.protocol(), values)
    return dataclasses.replace(
        score,
        perplexity=None if score.nats is None else perplexity(score.nats),
        bits_per_byte=math.fsum(score.losses) / math.log(2) / windows.bytes if windows.bytes else None,
    )


def _score_window(
    predict: Predict, reference: Predict | None, windows: Windows, index: int, *, keep: bool
) -> Begun:
    """Start a window; what waits for its logits and returns what measures them."""
    ids, first = windows.ids[index], windows.first[index]
    targets, rows = ids[first:], slice(first - 1, len(ids) - 1)
    inputs = (ids.unsqueeze(0),)
    started = start(predict, inputs)

    def finish() -> Callable[[], Record]:
        logits, other, seconds = run(f"window {index}", started, reference, inputs, (1, len(ids)), targets)
        float_rows = None if other is None else other[0, rows]
        measured = (index, logits[0, rows], targets, float_rows, seconds)
        return functools.partial(record, *measured, whole=True, keep=keep)

    return finish


def _targets(windows: Windows) -> list[int]:
    """The scored tokens of all windows, in order."""
    pairs = zip(windows.ids, windows.first, strict=True)
    return [token for ids, first in pairs for token in ids[first:].tolist()]
