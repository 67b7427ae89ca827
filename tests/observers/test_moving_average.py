"""MovingAverageObserver: the averages by hand, what starts them, and one freak batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qaware.observers import MovingAverageObserver


def observed(*batches: Tensor) -> MovingAverageObserver:
    observer = MovingAverageObserver()
    observer.observing = True
    for batch in batches:
        observer(batch)
    return observer


def values(observer: MovingAverageObserver) -> tuple[float, float]:
    low, high = observer.range()
    return float(low), float(high)


def batch(low: float, high: float) -> Tensor:
    return torch.tensor([0.3 * low, high, low])


def test_by_hand() -> None:
    found = values(observed(batch(-1, 2), batch(-3, 2), batch(-1, 7)))
    low = 0.99 * (0.99 * -1 + 0.01 * -3) + 0.01 * -1
    assert found == pytest.approx((low, 0.99 * 2 + 0.01 * 7))


def test_it_is_what_pytorch_computes() -> None:
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver

    theirs = MovingAverageMinMaxObserver()
    data = [torch.randn(50, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(30)]
    for x in data:
        theirs(x)
    assert values(observed(*data)) == pytest.approx((float(theirs.min_val), float(theirs.max_val)), rel=1e-6)


def test_one_freak_batch_hardly_counts() -> None:
    calm = [batch(-1, 1)] * 10
    low, high = values(observed(*calm, batch(-50, 100), *calm))
    assert -1.5 < low < -1
    assert 1 < high < 2


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_batch_that_overflowed_is_passed_over(bad: float) -> None:
    observer = observed(torch.tensor([1.0, bad]))
    assert not observer.seen
    assert int(observer.taken) == 0
    assert values(observed(batch(-1, 2), torch.tensor([bad, 9.0]), torch.zeros(0))) == (-1, 2)


def test_state_is_pre_shaped_and_each_statistic_declares_its_reduction() -> None:
    observer = observed(batch(-1, 2), batch(-2, 2))
    assert set(MovingAverageObserver.reduction) == set(observer.state_dict())
    assert {v.shape for v in observer.state_dict().values()} == {()}
    other = MovingAverageObserver()
    other.load_state_dict(observer.state_dict())
    assert values(other) == values(observer)
    observer.reset_parameters()
    assert not observer.seen
    assert int(observer.taken) == 0


def test_it_goes_on_moving_in_a_model_that_was_cast_to_half_precision() -> None:
    # The step from 1 by a hundredth of 0.1 is below the resolution of bfloat16.
    observer = observed(batch(-1, 1)).bfloat16()
    for _ in range(100):
        observer(batch(-1, 1.1).bfloat16())
    assert values(observer)[1] == pytest.approx(1 + 0.1016 * (1 - 0.99**100), rel=1e-3)
