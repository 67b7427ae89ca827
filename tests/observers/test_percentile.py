"""PercentileObserver: how many values it cuts off, at which end, and what that wins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qaware.observers import PercentileObserver


def observed(*batches: Tensor, order: tuple[int, ...] | None = None) -> PercentileObserver:
    observer = PercentileObserver()
    observer.observing = True
    for index in (0, 1):
        observer.pass_index = index
        for i in order or range(len(batches)):
            observer(batches[i])
    return observer


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("x", [normal(200_000), normal(200_000).abs(), normal(200_000) - 20])
def test_each_end_cuts_as_many_values_as_it_may_to_within_a_bin(x: Tensor) -> None:
    low, high = observed(*x.chunk(5)).range()
    width = float(x.max().clamp(min=0) - x.min().clamp(max=0)) / 2048
    for kept, inside in ((x >= low, x >= low + 1.01 * width), (x <= high, x <= high - 1.01 * width)):
        assert int((~kept).sum()) <= 10
        assert int((~inside).sum()) >= 10
    assert int((x > high).sum()) > 5


def test_every_order_of_the_batches_gives_the_same() -> None:
    batches = list((normal(90_000) ** 3).chunk(3))
    first = observed(*batches).range()
    for order in itertools.permutations(range(3)):
        assert observed(*batches, order=order).range() == first


def test_outliers_cost_nothing_but_themselves() -> None:
    x = normal(100_000)
    x[:3] = torch.tensor([40.0, -40.0, 40.0])
    low, high = observed(x).range()
    assert -4.5 < float(low) < -3
    assert 3 < float(high) < 4.5


def test_of_few_values_none_is_cut_off() -> None:
    x = normal(10_000)
    low, high = observed(x).range()
    assert (float(low), float(high)) == pytest.approx((float(x.min()), float(x.max())))


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constants(value: float) -> None:
    low, high = observed(torch.full((50_000,), value)).range()
    assert float(low) <= value
    assert float(high) == pytest.approx(value)


def test_state_is_pre_shaped_and_each_statistic_declares_its_reduction() -> None:
    observer = observed(normal(1000))
    assert set(PercentileObserver.reduction) == set(observer.state_dict())
    shapes = {k: v.shape for k, v in PercentileObserver().state_dict().items()}
    assert {k: v.shape for k, v in observer.state_dict().items()} == shapes
    assert PercentileObserver.passes == 2
