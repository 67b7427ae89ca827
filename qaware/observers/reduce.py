"""Combine the statistics of all ranks, by each observer's own declaration."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from qaware.observers.minmax import MinMaxObserver

_OPS = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}


def observers(model: nn.Module) -> Iterator[MinMaxObserver]:
    """The observers inside ``model``."""
    return (m for m in model.modules() if isinstance(m, MinMaxObserver))


@torch.no_grad()
def all_reduce(model: nn.Module) -> None:
    """Give every rank the same statistics; one collective for each kind of reduction.

    Sums are over what every rank saw itself, so after each pass over the data it is called once.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for kind, op in _OPS.items():
        stats = [getattr(o, n) for o in observers(model) for n, how in o.reduction.items() if how == kind]
        if not stats:
            continue
        flat = torch.cat([s.reshape(-1) for s in stats])
        # Models are calibrated on the CPU, where NCCL has nothing to reduce with.
        flat = flat.cuda() if dist.get_backend() == "nccl" else flat
        dist.all_reduce(flat, op=op)
        for stat, new in zip(stats, flat.split([s.numel() for s in stats]), strict=True):
            stat.copy_(new.view_as(stat))
