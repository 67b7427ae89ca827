"""Logits that are computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from qaware.metrics.remembered import Remembered


class Counted:
    """Doubles, and counts its calls."""

    calls = 0

    def __call__(self, *tensors: Tensor) -> Tensor:
        self.calls += 1
        return sum(2 * tensor for tensor in tensors)  # type: ignore[return-value]


def test_the_same_tensors_are_computed_once() -> None:
    predict = Counted()
    run = Remembered(predict)
    for _ in range(2):
        for x in (torch.arange(4.0), torch.arange(4.0).view(2, 2), torch.arange(4), torch.ones(4)):
            assert torch.equal(run(x, x), 4 * x)
    assert predict.calls == 4


def test_what_is_kept_has_a_bound() -> None:
    predict = Counted()
    run = Remembered(predict, most=2 * 4 * 4 + 4)
    for _ in range(2):
        for value in range(4):
            assert torch.equal(run(torch.full((4,), float(value))), torch.full((4,), 2.0 * value))
    assert predict.calls == 2 + 2 + 2
    assert run(torch.ones(1)) == 2  # a small one fits where a large one did not
    assert run(torch.ones(1)) == 2
    assert predict.calls == 7
