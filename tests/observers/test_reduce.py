"""all_reduce: two real processes end with the statistics of both."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from qaware.observers import HistogramObserver, MinMaxObserver, all_reduce, observers


def model() -> nn.Module:
    """Observers, of which rank 1 never uses the second, beside a layer that must not change."""
    second = nn.Sequential(nn.Linear(2, 2), MinMaxObserver())
    return nn.ModuleDict({"a": MinMaxObserver(), "b": second, "c": HistogramObserver()})


def batches() -> list[Tensor]:
    return list((torch.randn(3000, generator=torch.Generator().manual_seed(0)) ** 3).chunk(5))


def watch(histogram: HistogramObserver, share: list[Tensor], index: int) -> None:
    histogram.observing, histogram.pass_index = True, index
    for batch in share:
        histogram(batch)


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
    for index in (0, 1):
        watch(net["c"], batches()[rank::2], index)
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
    alone = HistogramObserver()
    for index in (0, 1):
        watch(alone, batches(), index)
    for state in states:
        assert all(torch.equal(state[f"c.{key}"], value) for key, value in alone.state_dict().items())


def test_one_process_is_left_as_it_is() -> None:
    net = model()
    net["a"].observing = True
    net["a"](torch.tensor([1.0, 2.0]))
    all_reduce(net)
    assert [float(v) for v in net["a"].range()] == [1, 2]


def test_observers_finds_all_and_only_them() -> None:
    net = model()
    assert list(observers(net)) == [net["a"], net["b"][1], net["c"]]
    assert list(observers(nn.Linear(2, 2))) == []
