"""From one unit of data (a window, a batch) to a score: measure it, gather over ranks, add up.

Every unit becomes one record with its index. Records of all ranks are sorted by index and added with
`math.fsum`, so the number of ranks does not change one bit of the result; nothing is averaged over
batches, and a sampler that repeats units to even out its shards does no harm.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qaware.errors import QawareError
from qaware.metrics.nats import measure
from qaware.metrics.score import Score, fingerprint_of, half_width
from qaware.metrics.windows import describe

Gather = Callable[[list[Any]], list[Any]]
"""Takes this rank's records and returns those of all ranks in one flat list, on every rank."""

Started = Callable[[], tuple[Any, float]]
"""Waits for what a model gives, and tells the wall seconds that it took."""


@dataclass(frozen=True)
class Record:
    """What one unit of data adds to the score. Plain numbers: it is pickled between ranks."""

    index: int
    losses: tuple[float, ...]
    counts: tuple[int, ...]
    seconds: float
    predictions: tuple[int, ...]
    kl: float | None
    agree: int | None
    hits: tuple[int, ...] = ()
    """For each loss of one row 1 where its target is the argmax, else 0."""
    signal: float | None = None
    """Of a classifier: sum of the squares of the reference's logits; None without a reference."""
    noise: float | None = None
    """Of a classifier: sum of the squares of the differences from them."""


Begun = Callable[[], Callable[[], Record]]
"""Waits for the logits of a unit that was started, and returns what measures them."""


@dataclass(frozen=True)
class _Failure:
    index: int
    message: str


@dataclass(frozen=True)
class Shard:
    """This rank's share of the units: ``rank``, ``rank + world``, ... and how to get everybody's records."""

    rank: int = 0
    world: int = 1
    gather: Gather | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise QawareError(f"rank: {self.rank} of world {self.world} must be from 0 to world - 1")
        ready = dist.is_available() and dist.is_initialized()
        if self.world > 1 and self.gather is None and not (ready and dist.get_world_size() == self.world):
            raise QawareError(
                f"world: {self.world} ranks need torch.distributed to be initialised with as many processes; "
                "initialise it first, or pass gather="
            )

    def collect(
        self,
        one: Callable[[int], Begun],
        total: int,
        on_unit: Callable[[], None] | None,
        beside: bool = False,
    ) -> list[Record]:
        """Measure this rank's units; all ranks' records, one for each index below total.

        A unit that fails on one rank fails on every rank. Otherwise the others would wait for it in gather.

        Args:
            one: starts a unit; what it returns waits for the logits, and returns what measures them.
            total: number of units.
            on_unit: called after each.
            beside: start a unit before the one before it has run, and measure it while the next one runs;
                for a model in a process of its own.
        """
        done: list[Record | _Failure] = []
        mine: Exception | None = None
        units = range(self.rank, total, self.world)
        try:
            for found in _one_behind(one, units) if beside else (one(index)()() for index in units):
                done.append(found)
                if on_unit is not None:
                    on_unit()
        except Exception as error:
            if self.world == 1:
                raise
            mine = error
            index = units[len(done)]
            done.append(_Failure(index, f"rank {self.rank}: {type(error).__name__}: {error}"))
        everyone = self._gather(done)
        if mine is not None:
            raise mine
        return _complete(everyone, total)

    def _gather(self, items: list[Record | _Failure]) -> list[Any]:
        if self.gather is not None:
            return self.gather(items)
        if self.world == 1:
            return list(items)
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, items)
        return list(chain.from_iterable(parts))


def _one_ahead(one: Callable[[int], Begun], units: Iterable[int]) -> Iterator[Begun]:
    """Each of ``units``, started, when the next one is too: who runs them need not wait for us."""
    before: Begun | None = None
    for index in units:
        now = one(index)
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before


def _one_behind(one: Callable[[int], Begun], units: Iterable[int]) -> Iterator[Record]:
    """The records of ``units``, each measured in a thread while the next unit runs."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Record]] = deque()
        for begun in _one_ahead(one, units):
            try:
                waiting.append(pool.submit(begun()))
            except Exception:
                # An earlier unit that fails is the one to be told of.
                yield from (future.result() for future in waiting)
                raise
            if len(waiting) > 1:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def computes_elsewhere(predict: Callable[..., Any]) -> bool:
    """Whether a model runs in a process of its own, so that this one has time while it runs."""
    return hasattr(predict, "submit")


def start(predict: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Started:
    """Start a model that runs in a process of its own, see
    :meth:`qaware.exporters.isolated.IsolatedRunner.submit`; others run when the result is asked for.

    It gets copies of ``inputs``: a runtime that writes into its input would change the data for the next.
    """
    if not computes_elsewhere(predict):
        return partial(_timed, predict, inputs)
    try:
        answer = predict.submit(*(tensor.clone() for tensor in inputs))  # type: ignore[attr-defined]
    except Exception as error:  # is for this unit's turn to tell, and the one before has not had its own
        return partial(_raise, error)
    return lambda: (answer.get(), answer.seconds)


def _raise(error: Exception) -> Any:
    raise error


def run(
    label: str,
    started: Started,
    reference: Callable[..., Any] | None,
    inputs: tuple[Tensor, ...],
    leading: tuple[int, ...],
    targets: Tensor,
) -> tuple[Tensor, Tensor | None, float]:
    """Logits (*leading, V) of the model and of the reference, if any, and the model's wall seconds.

    Raises QawareError that starts with ``label`` for logits that cannot be scored.
    """
    logits, seconds = started()
    _check_logits(label, logits, leading, targets)
    if reference is None:
        return logits, None, seconds
    other, _ = _timed(reference, inputs)
    _check_logits(f"{label}, reference", other, leading, targets)
    if other.shape != logits.shape:
        raise QawareError(
            f"{label}: the model has {logits.shape[-1]} logits and the reference {other.shape[-1]}; "
            "the reference must be the float model that this one was made from"
        )
    return logits, other, seconds


def record(
    index: int,
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    seconds: float,
    whole: bool,
    keep: bool,
) -> Record:
    """Measure (N, V) logits against (N,) targets: as one loss if ``whole``, else one loss for each row.

    ``keep`` stores the N argmax predictions, for `evaluate` metrics.
    """
    rows = measure(logits, targets, reference)
    nll = rows.nll.tolist()
    return Record(
        index=index,
        losses=(math.fsum(nll),) if whole else tuple(nll),
        counts=(len(nll),) if whole else (1,) * len(nll),
        seconds=seconds,
        predictions=tuple(rows.predicted.tolist()) if keep else (),
        kl=None if rows.kl is None else math.fsum(rows.kl.tolist()),
        agree=None if rows.agree is None else int(rows.agree.sum()),
        hits=() if whole else tuple((rows.predicted == targets.cpu()).int().tolist()),
    )


def add_up(records: Sequence[Record], protocol: dict[str, Any], extra: dict[str, float]) -> Score:
    """Add up records that are sorted by index; what only one task has (perplexity, accuracy) is left None."""
    losses = tuple(chain.from_iterable(item.losses for item in records))
    counts = tuple(chain.from_iterable(item.counts for item in records))
    count = sum(counts)
    kl = [item.kl for item in records if item.kl is not None]
    agree = [item.agree for item in records if item.agree is not None]
    return Score(
        nats=math.fsum(losses) / count,
        perplexity=None,
        bits_per_byte=None,
        accuracy=None,
        kl=math.fsum(kl) / count if kl else None,
        top1=sum(agree) / count if agree else None,
        ci95=half_width(losses, counts),
        count=count,
        seconds=math.fsum(item.seconds for item in records),
        fingerprint=fingerprint_of(protocol),
        protocol=protocol,
        losses=losses,
        counts=counts,
        extra=extra,
    )


def _timed(predict: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Any, float]:
    """Call without gradients; the result and the wall seconds until it really is there."""
    copies = tuple(tensor.clone() for tensor in inputs)
    with torch.no_grad():
        start = time.perf_counter()
        result = predict(*copies)
        if isinstance(result, Tensor) and result.device.type != "cpu":
            torch.accelerator.synchronize(result.device)
    return result, time.perf_counter() - start


def _check_logits(label: str, logits: Any, leading: tuple[int, ...], targets: Tensor) -> None:
    """Refuse what is not finite float logits of shape (*leading, V) with a column for each of ``targets``."""
    wanted = f"({', '.join(map(str, leading))}, V) float"
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape[:-1] != leading:
        raise QawareError(
            f"{label}: got {describe(logits)}, need {wanted} logits; wrap the model so that it returns them"
        )
    # Two numbers rather than a boolean for each logit: it is looked at while the next window could run.
    if logits.numel() and not all(bool(end.isfinite()) for end in logits.aminmax()):
        bad = int(logits.numel() - logits.isfinite().sum())
        raise QawareError(
            f"{label}: {bad} of {logits.numel()} {str(logits.dtype).removeprefix('torch.')} logits "
            "are NaN or infinite; keep the layer that overflows in float, or use a wider dtype"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[-1]:
        raise QawareError(
            f"{label}: target {low if low < 0 else high} has no column among {logits.shape[-1]} logits; "
            "the data must come from the model's own tokenizer or label set, without padding"
        )


def _complete(everyone: list[Any], total: int) -> list[Record]:
    """One record for each index, in order, out of all ranks' records and failures."""
    failures = [item for item in everyone if isinstance(item, _Failure)]
    if failures:
        raise QawareError(min(failures, key=lambda item: item.index).message)
    if not all(isinstance(item, Record) for item in everyone):
        raise QawareError("gather: it must return all ranks' records in one flat list")
    by_index = {item.index: item for item in everyone}
    if missing := [index for index in range(total) if index not in by_index]:
        raise QawareError(
            f"gather: {len(missing)} of {total} records are missing, the first is {missing[0]}; "
            "it must bring together the records of all ranks"
        )
    return [by_index[index] for index in range(total)]
