"""Buffers that a run changes are as they were after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qaware
from qaware.buffers import own_buffers


class Counts(nn.Module):
    """Counts calls, and keeps what it made last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)
        self.register_buffer("same", self.calls)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.layer(x)
        return self.last


def test_what_is_written_is_gone_afterwards() -> None:
    model = Counts()
    before = model.calls
    with own_buffers(model, {"calls": torch.tensor(5.0)}):
        model(torch.zeros(1, 4))
        assert float(model.calls) == 6
    with own_buffers(model):
        model(torch.zeros(1, 4))
        assert model.same is model.calls
        assert float(model.calls) == 1
    assert model.calls is before
    assert float(before) == 0
    assert model.last is None


def test_types_that_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), Counts())
    with own_buffers(model, but=(nn.BatchNorm1d,)):
        model(torch.ones(2, 4))
    assert float(model[0].num_batches_tracked) == 1
    assert float(model[1].calls) == 0


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_calibration_leaves_nothing_in_a_model_that_ships(observer: str) -> None:
    scheme = {"bits": 8, "activation": "int8-static", "observer": observer}
    recipe = {"rules": [{"type": "Linear", "scheme": scheme}]}
    made = qaware.quantize(Counts(), recipe, calibration=[torch.randn(2, 4) for _ in range(3)])
    assert float(made.module.calls) == 0
    assert made.module.last is None
    assert made.activations["layer"].scale > 0
