"""MinMaxObserver: what it sees, when it looks away, and that its state travels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qaware.observers import MinMaxObserver


def watching() -> MinMaxObserver:
    observer = MinMaxObserver()
    observer.observing = True
    return observer


def values(observer: MinMaxObserver) -> tuple[float, float]:
    low, high = observer.range()
    return float(low), float(high)


def test_it_keeps_the_extremes_of_all_batches_in_any_order() -> None:
    batches = [torch.tensor([[1.0, -2.0]]), torch.tensor(7.0), torch.tensor([0.5, -3.0, 0.0])]
    for order in (batches, batches[::-1]):
        observer = watching()
        for batch in order:
            observer(batch)
        assert values(observer) == (-3, 7)


def test_nothing_is_seen_unless_it_observes() -> None:
    observer = MinMaxObserver()
    assert not observer.observing
    observer(torch.ones(3))
    assert not observer.seen
    assert values(observer) == (math.inf, -math.inf)
    observer.observing = True
    observer(torch.ones(3))
    assert observer.seen
    observer.observing = False
    observer(torch.full((3,), 99.0))
    assert values(observer) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    observer = watching()
    observer(torch.tensor([-1.5, 2.5], dtype=dtype))
    assert values(observer) == (-1.5, 2.5)
    assert observer.min_val.dtype == torch.float32


def test_an_empty_batch_is_passed_over() -> None:
    # A mixture of experts sends no token to some of them.
    observer = watching()
    observer(torch.zeros(0, 4))
    assert not observer.seen


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_batch_that_overflowed_is_passed_over(bad: float) -> None:
    observer = watching()
    observer(torch.tensor([1.0, bad, 99.0]))
    assert not observer.seen
    for batch in ([1.0, 2.0], [bad, -5.0], [0.0, 3.0]):
        observer(torch.tensor(batch))
    assert values(observer) == (0, 3)


def test_state_is_in_pre_shaped_buffers_and_the_flag_is_not() -> None:
    observer = watching()
    before = {k: v.shape for k, v in observer.state_dict().items()}
    observer(torch.randn(5, 5))
    assert {k: v.shape for k, v in observer.state_dict().items()} == before == {"min_val": (), "max_val": ()}
    other = MinMaxObserver()
    other.load_state_dict(observer.state_dict())
    assert values(other) == values(observer)
    assert not other.observing


def test_buffers_are_written_in_place() -> None:
    # Checkpoints, averaging and broadcasting hold the tensors themselves.
    observer = watching()
    buffers = [id(b) for b in observer.buffers()]
    observer(torch.randn(4))
    assert [id(b) for b in observer.buffers()] == buffers


def test_every_statistic_declares_its_reduction() -> None:
    assert set(MinMaxObserver.reduction) == set(MinMaxObserver().state_dict())


def test_the_graph_is_not_kept() -> None:
    observer, x = watching(), torch.randn(3, requires_grad=True)
    observer(x * 2)
    assert not observer.min_val.requires_grad
    copy.deepcopy(observer)


def test_recomputation_inside_backward_does_not_count() -> None:
    observer, calls = watching(), []

    def step(x: Tensor) -> Tensor:
        calls.append(1)
        observer(x * len(calls))
        return x.pow(3)

    x = torch.ones(3, requires_grad=True)
    y = checkpoint(step, x, use_reentrant=False)
    y.pow(2).sum().backward()
    assert len(calls) == 2
    assert values(observer) == (1, 1)
