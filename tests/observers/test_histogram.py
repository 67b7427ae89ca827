"""HistogramObserver: exact counts over two passes, and a range that costs least."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qaware.observers import HistogramObserver
from qaware.observers.histogram import BINS, best_range, rounding_error


def feed(observer: HistogramObserver, batches: list[Tensor], index: int) -> None:
    observer.observing, observer.pass_index = True, index
    for batch in batches:
        observer(batch)
    observer.observing, observer.pass_index = False, 0


def observed(*batches: Tensor) -> HistogramObserver:
    observer = HistogramObserver()
    feed(observer, list(batches), 0)
    feed(observer, list(batches), 1)
    return observer


def normal(count: int = 20_000, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def with_outliers() -> Tensor:
    x = normal()
    x[:2] = torch.tensor([60.0, -45.0])
    return x


def rounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = (high - low) / 255
    zero_point = int(-128 - (low / scale).round())
    return torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, -128, 127)


def cost(x: Tensor, low: Tensor, high: Tensor) -> float:
    return float((rounded(x, low, high) - x).double().square().sum())


def test_counts_are_those_of_a_histogram_over_the_whole_range() -> None:
    x = with_outliers().double().float()
    observer = observed(*x.chunk(7))
    expected, _ = np.histogram(x.numpy(), bins=BINS, range=(-45.0, 60.0))
    found = observer.counts.numpy()
    assert observer.counts.dtype == torch.int64
    assert found.sum() == len(x)
    # A value within float32's rounding of an edge may fall on its other side.
    assert np.abs(found - expected).sum() <= 20


def test_every_order_of_the_batches_gives_the_same() -> None:
    batches = list(with_outliers().chunk(3))
    first = observed(*batches)
    for order in itertools.permutations(batches):
        other = HistogramObserver()
        feed(other, list(order), 0)
        feed(other, list(reversed(order)), 1)
        assert torch.equal(other.counts, first.counts)
        assert other.range() == first.range()


def test_outliers_are_cut_off_where_that_costs_less() -> None:
    x = normal(200_000) ** 3
    low, high = observed(x).range()
    assert float(x.min()) < 0.95 * float(low) < -10
    assert 10 < float(high) < 0.95 * float(x.max())
    assert cost(x, low, high) < 0.85 * cost(x, x.min(), x.max())


@pytest.mark.parametrize(
    "x",
    [
        normal(),
        normal() ** 3,
        normal().relu(),
        normal().abs() + 5,
        -normal().abs() - 2,
        normal().exp(),
        torch.rand(5000, generator=torch.Generator().manual_seed(0)) - 0.3,
    ],
    ids=["normal", "cubed", "relu", "above", "below", "lognormal", "uniform"],
)
def test_never_worse_than_the_extremes_and_close_to_the_best_of_all_pairs(x: Tensor) -> None:
    low, high = observed(x).range()
    found = cost(x, low, high)
    least, most = x.min().clamp(max=0), x.max().clamp(min=0)
    assert found <= cost(x, least, most) * 1.001
    shares = torch.linspace(0.2, 1, 17)
    pairs = itertools.product(shares if least < 0 else [1.0], shares if most > 0 else [1.0])
    assert found <= min(cost(x, least * a, most * b) for a, b in pairs) * 1.02


def test_zeros_do_not_change_the_range() -> None:
    # They are on every grid: a mostly padded batch must not look cheap to round.
    x = normal().relu()
    full = observed(x, torch.zeros(200_000))
    assert full.range() == observed(x).range()
    assert int(full.counts.sum()) == 220_000


def test_the_expected_error_is_that_of_values_spread_evenly_in_their_bins() -> None:
    edges = torch.linspace(-1, 2, 31, dtype=torch.float64)
    mass = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x = edges[:-1, None] + edges.diff()[:, None] * inside
    lows, highs = torch.tensor([-1.0, -0.3, 0.0, -1.0]).double(), torch.tensor([2.0, 1.1, 1.9, 0.0]).double()
    for low, high, found in zip(lows, highs, rounding_error(edges, mass, lows, highs), strict=True):
        expected = ((rounded(x, low, high) - x) ** 2).mean(1) @ mass
        assert float(found) == pytest.approx(float(expected), rel=2e-3)


def test_without_anything_to_gain_the_range_stays_whole() -> None:
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)
    low, high = best_range(edges, torch.zeros(BINS, dtype=torch.float64))
    assert (float(low), float(high)) == (-1, 1)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [([0.0, 0.0], (0, 0)), ([3.0, 3.0], (0, 3)), ([-3.0], (-3, 0)), ([1e-44, 2e-44], (0, 0))],
)
def test_constants(batch: list[float], expected: tuple[float, float]) -> None:
    low, high = observed(torch.tensor(batch)).range()
    assert (float(low), float(high)) == pytest.approx(expected)


def test_it_has_seen_nothing_before_the_second_pass() -> None:
    observer = HistogramObserver()
    feed(observer, [normal()], 0)
    assert not observer.seen
    feed(observer, [normal()], 1)
    assert observer.seen
    observer.reset_parameters()
    assert not observer.seen
    assert [float(v) for v in (observer.min_val, observer.max_val)] == [math.inf, -math.inf]


def test_nothing_is_counted_unless_it_observes() -> None:
    observer = observed(normal())
    before = copy.deepcopy(observer.state_dict())
    for index in (0, 1):
        observer.pass_index = index
        observer(normal(seed=9) * 100)
    assert all(torch.equal(value, before[key]) for key, value in observer.state_dict().items())


def test_values_beyond_the_frozen_range_count_at_its_ends() -> None:
    observer = HistogramObserver()
    feed(observer, [torch.tensor([-1.0, 1.0])], 0)
    feed(observer, [torch.tensor([-9.0, 0.5, 9.0, 9.0])], 1)
    assert observer.counts[0] == 1
    assert observer.counts[-1] == 2
    assert observer.counts.sum() == 4


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_batch_that_overflowed_is_passed_over_in_both_passes(bad: float) -> None:
    good, broken = normal(), torch.tensor([1.0, bad, 99.0])
    assert torch.equal(observed(good, broken).counts, observed(good).counts)
    assert not observed(broken).seen


def test_an_empty_batch_and_any_shape_and_dtype() -> None:
    x = normal(600).bfloat16()
    expected = observed(x.float()).counts
    assert torch.equal(observed(x.view(2, 3, 100), x.new_zeros(0, 4)).counts, expected)


def test_a_cast_to_half_precision_leaves_the_counts_alone() -> None:
    x = normal(100_000)
    observer = observed(x.round())
    expected = observer.counts.clone()
    assert int(expected.max()) > 2048  # not a bfloat16 number
    nn.ModuleList([observer]).bfloat16()
    assert torch.equal(observer.counts, expected)


def test_state_is_pre_shaped_and_each_statistic_declares_its_reduction() -> None:
    observer = observed(normal())
    assert set(HistogramObserver.reduction) == set(HistogramObserver().state_dict())
    other = HistogramObserver()
    other.load_state_dict(observer.state_dict())
    assert other.range() == observer.range()
