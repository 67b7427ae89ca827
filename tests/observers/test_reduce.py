"""all_reduce: two real processes end with the statistics of both."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from qaware.observers import MinMaxObserver, all_reduce, observers


def model() -> nn.Module:
    """Two observers, of which rank 1 never uses the second, beside a layer that must not change."""
    return nn.ModuleDict({"a": MinMaxObserver(), "b": nn.Sequential(nn.Linear(2, 2), MinMaxObserver())})


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    net = model()
    nn.init.constant_(net["b"][0].weight, rank)
    for observer in observers(net):
        observer.observing = True
    net["a"](torch.tensor([-1.0 - rank, 5.0 + rank]))
    if rank == 0:
        net["b"][1](torch.tensor([-7.0, 3.0]))
    all_reduce(net)
    all_reduce(nn.Linear(2, 2))  # nothing to do, on any rank
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank, state in enumerate(states):
        assert (float(state["a.min_val"]), float(state["a.max_val"])) == (-2, 6)
        assert (float(state["b.1.min_val"]), float(state["b.1.max_val"])) == (-7, 3)
        assert bool((state["b.0.weight"] == rank).all())


def test_one_process_is_left_as_it_is() -> None:
    net = model()
    net["a"].observing = True
    net["a"](torch.tensor([1.0, 2.0]))
    all_reduce(net)
    assert [float(v) for v in net["a"].range()] == [1, 2]


def test_observers_finds_all_and_only_them() -> None:
    net = model()
    assert list(observers(net)) == [net["a"], net["b"][1]]
    assert list(observers(nn.Linear(2, 2))) == []
