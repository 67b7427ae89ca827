"""MSEObserver: costs against brute force, the range that it picks, and that orders do not matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qaware.observers import KINDS, MinMaxObserver, MSEObserver
from qaware.observers.mse import rounding_cost


def feed(observer: MinMaxObserver, batches: list[Tensor]) -> MinMaxObserver:
    observer.observing = True
    for index in range(observer.passes):
        observer.pass_index = index
        for batch in batches:
            observer(batch)
    return observer


def observed(*batches: Tensor) -> MSEObserver:
    observer = feed(MSEObserver(), list(batches))
    assert isinstance(observer, MSEObserver)
    return observer


def normal(count: int = 20_000, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def with_outliers() -> Tensor:
    x = normal(500_000)
    x[:2] = torch.tensor([13.0, -12.0])
    return x


def cost(x: Tensor, low: Tensor, high: Tensor) -> float:
    scale = (high - low) / 255
    zero_point = int(-128 - (low / scale).round())
    rounded = torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, -128, 127)
    return float((rounded - x).double().square().sum())


def test_costs_are_those_of_every_candidate_over_all_values() -> None:
    batches = list((normal(3000) ** 3).chunk(4))
    observer = observed(*batches)
    whole = torch.cat(batches)
    expected = [cost(whole, low, high) for low, high in observer._candidates()]
    # Of two values that are equally near, one may go either way.
    assert observer.costs.tolist() == pytest.approx(expected, rel=1e-4)
    low, high = observer.range()
    assert cost(whole, low, high) == pytest.approx(min(expected), rel=1e-4)
    assert int(observer.count) == 3000


def test_a_part_of_the_cache_size_at_a_time_gives_the_same_sum() -> None:
    x = normal(200_000)
    assert float(rounding_cost(x, -2.0, 3.0)) == pytest.approx(
        cost(x, torch.tensor(-2.0), torch.tensor(3.0)), rel=1e-5
    )


def test_every_order_of_the_batches_gives_the_same_range() -> None:
    batches = list((normal(9000) ** 3).chunk(3))
    first = observed(*batches).range()
    for order in itertools.permutations(batches):
        assert observed(*order).range() == first


@pytest.mark.parametrize("x", [normal().relu(), -normal().abs()], ids=["positive", "negative"])
def test_where_one_end_is_zero_it_stays(x: Tensor) -> None:
    low, high = observed(x).range()
    assert 0 in (float(low), float(high))
    assert cost(x, low, high) <= cost(x, x.min().clamp(max=0), x.max().clamp(min=0))


@pytest.mark.parametrize("observer", ["histogram", "percentile", "mse"])
def test_outliers_are_worth_cutting_off(observer: str) -> None:
    x = with_outliers()
    whole = cost(x, *feed(KINDS["minmax"](), [x]).range())
    found = cost(x, *feed(KINDS[observer](), [x]).range())
    assert 10 * math.log10(whole / found) > 2  # in decibels of signal to noise


def test_it_is_close_to_the_histogram_which_searches_finer() -> None:
    for x in (with_outliers(), normal(), normal() ** 3, normal().exp()):
        found = cost(x, *observed(x).range())
        assert found <= 1.15 * cost(x, *feed(KINDS["histogram"](), [x]).range())


@pytest.mark.parametrize(
    ("batch", "expected"), [([0.0, 0.0], (0, 0)), ([3.0, 3.0], (0, 3)), ([-3.0], (-3, 0))]
)
def test_constants(batch: list[float], expected: tuple[float, float]) -> None:
    observer = observed(torch.tensor(batch))
    assert observer.seen
    low, high = observer.range()
    assert (float(low), float(high)) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_batch_that_overflowed_is_passed_over_in_both_passes(bad: float) -> None:
    good, broken = normal(500), torch.tensor([1.0, bad, 99.0])
    assert torch.equal(observed(good, broken).costs, observed(good).costs)
    assert not observed(broken).seen


def test_it_has_seen_nothing_before_the_second_pass_or_after_a_reset() -> None:
    observer = MSEObserver()
    observer.observing = True
    observer(normal())
    assert not observer.seen
    observer.pass_index = 1
    observer(normal())
    assert observer.seen
    observer.reset_parameters()
    assert not observer.seen
    assert not observer.costs.any()


def test_state_is_pre_shaped_keeps_its_precision_and_declares_its_reduction() -> None:
    observer = observed(normal(500))
    assert set(MSEObserver.reduction) == set(observer.state_dict())
    shapes = {k: v.shape for k, v in MSEObserver().state_dict().items()}
    assert {k: v.shape for k, v in observer.state_dict().items()} == shapes
    expected = observer.costs.clone()
    assert torch.equal(observer.bfloat16().costs, expected)
