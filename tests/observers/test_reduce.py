"""all_reduce: two real processes end with the statistics of both."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from qaware.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
    all_reduce,
    observers,
)

TWO_PASSES = {"c": HistogramObserver, "d": PercentileObserver, "e": MSEObserver}


def model() -> nn.Module:
    """Observers, of which rank 1 never uses the second, beside a layer that must not change."""
    second = nn.Sequential(nn.Linear(2, 2), MinMaxObserver())
    several = {name: kind() for name, kind in TWO_PASSES.items()}
    averages = {name: MovingAverageObserver() for name in ("f", "g", "h")}
    return nn.ModuleDict({"a": MinMaxObserver(), "b": second, **several, **averages})


def batches() -> list[Tensor]:
    return list((torch.randn(3000, generator=torch.Generator().manual_seed(0)) ** 3).chunk(5))


def watch(observer: MinMaxObserver, share: list[Tensor], index: int) -> None:
    observer.observing, observer.pass_index = True, index
    for batch in share:
        observer(batch)


def train(f: MovingAverageObserver, g: MovingAverageObserver, rank: int) -> None:
    """Three steps that reduce after each, in the second of which rank 1 has nothing for ``f``; then a pass in
    which rank 0 has two batches for ``g`` and rank 1 has one."""
    both = nn.ModuleList([f, g])
    for step in range(3):
        if (rank, step) != (1, 1):
            f(torch.tensor([-1.0 - rank - step, 3.0 + rank]))
        all_reduce(both)
    for batch in range(2 - rank):
        g(torch.tensor([-1.0 - rank, 3.0 + batch]))
    all_reduce(both)
    all_reduce(both)  # the statistics are equal now, so it changes nothing


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
        for name in TWO_PASSES:
            watch(net[name], batches()[rank::2], index)
        all_reduce(net)
    train(net["f"], net["g"], rank)
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
    for name, kind in TWO_PASSES.items():
        alone = kind()
        for index in (0, 1):
            watch(alone, batches(), index)
        for state in states:
            for key, value in alone.state_dict().items():
                # Counts are exact; sums of float errors are to their last bits.
                assert torch.allclose(state[f"{name}.{key}"], value, rtol=1e-12 * value.is_floating_point())
    check_averages(states)


def check_averages(states: list[dict[str, Tensor]]) -> None:
    low = -1.5  # the mean of both ranks' first batches
    low += 0.01 * (-2 - low)  # rank 1 had none, so its standing still does not count
    low += 0.01 * (-3.5 - low)
    for state in states:
        assert float(state["f.min_val"]) == pytest.approx(low)
        expected = (-1 * 2 - 2) / 3, (2 * (0.99 * 3 + 0.01 * 4) + 3) / 3
        assert (float(state["g.min_val"]), float(state["g.max_val"])) == pytest.approx(expected)
        assert (float(state["h.min_val"]), float(state["h.max_val"])) == (math.inf, -math.inf)


def test_one_process_is_left_as_it_is() -> None:
    net = model()
    net["a"].observing = True
    net["a"](torch.tensor([1.0, 2.0]))
    all_reduce(net)
    assert [float(v) for v in net["a"].range()] == [1, 2]


def test_observers_finds_all_and_only_them() -> None:
    net = model()
    assert list(observers(net)) == [net["a"], net["b"][1], *(net[name] for name in "cdefgh")]
    assert list(observers(nn.Linear(2, 2))) == []
