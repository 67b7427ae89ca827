"""Combine the statistics of all ranks, by each observer's own declaration."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qaware.observers.minmax import MinMaxObserver
from qaware.observers.moving_average import MovingAverageObserver

_OPS = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}


def observers(model: nn.Module) -> Iterator[MinMaxObserver]:
    """The observers inside ``model``."""
    return (m for m in model.modules() if isinstance(m, MinMaxObserver))


@torch.no_grad()
def all_reduce(model: nn.Module) -> None:
    """Give every rank the same statistics; one collective for each kind of reduction and dtype.

    Sums are over what every rank saw itself, so after each pass over the data it is called once.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for kind, op in _OPS.items():
        stats = [getattr(o, n) for o in observers(model) for n, how in o.reduction.items() if how == kind]
        # Counts are integers, whose sums no float holds exactly.
        for dtype in dict.fromkeys(stat.dtype for stat in stats):
            _combine([stat for stat in stats if stat.dtype == dtype], op)
    _average([o for o in observers(model) if isinstance(o, MovingAverageObserver)])


def _combine(stats: list[Tensor], op: dist.ReduceOp.RedOpType) -> None:
    flat = _reduced(torch.cat([s.reshape(-1) for s in stats]), op)
    for stat, new in zip(stats, flat.split([s.numel() for s in stats]), strict=True):
        stat.copy_(new.view_as(stat))


def _average(watching: list[MovingAverageObserver]) -> None:
    """Means over the ranks, weighed by the batches that each took since the last time."""
    if not watching:
        return
    taken = torch.stack([o.taken for o in watching]).double()
    averages = torch.stack([torch.stack([o.min_val, o.max_val]) for o in watching]).double()
    # Before its first batch an observer holds infinities, which must not enter the sum as NaN.
    sums = torch.where(taken.unsqueeze(1) > 0, averages * taken.unsqueeze(1), 0)
    total = _reduced(torch.cat([taken.unsqueeze(1), sums], 1), dist.ReduceOp.SUM)
    for observer, (weight, low, high) in zip(watching, total, strict=True):
        some = weight > 0  # else no rank has moved
        observer.min_val.copy_(torch.where(some, low / weight, observer.min_val))
        observer.max_val.copy_(torch.where(some, high / weight, observer.max_val))
        observer.taken.zero_()


def _reduced(flat: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    # Models are calibrated on the CPU, where NCCL has nothing to reduce with.
    flat = flat.cuda() if dist.get_backend() == "nccl" else flat
    dist.all_reduce(flat, op=op)
    return flat
