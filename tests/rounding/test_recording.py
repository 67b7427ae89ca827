"""What enters a model, kept and run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import recorded
from rounded import ids, net
from torch import Tensor, nn

from qaware.buffers import own_buffers
from qaware.calibration import Look
from qaware.errors import QawareError
from qaware.rounding.recording import record


def test_calls_are_kept_in_order() -> None:
    model = net()
    recording = recorded(model, ids())
    assert [call.module for call in recording] == ["", "", ""]
    assert torch.equal(recording[1].run(model), model(ids()[1]))


def test_inputs_that_a_model_changes_are_kept() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mul_(2))

    model, x = InPlace(), torch.ones(2, 4)
    recording = recorded(model, [x])
    outputs = [recording[0].run(model) for _ in range(2)]
    assert torch.equal(outputs[0], outputs[1])
    assert float(recording[0].example.args[0][0, 0]) == 1.0


class Remembers(nn.Module):
    """Adds what it made of the last batch; counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(2, 4))
        self.register_buffer("batches", torch.zeros(()))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        self.last = self.late = self.layer(x + self.last)
        return self.last


def test_buffers_are_as_they_were_at_each_call_and_afterwards() -> None:
    model, batches = Remembers(), [torch.randn(2, 4) for _ in range(3)]
    before = {name: (b, b.clone()) for name, b in model.named_buffers()}
    recording = recorded(model, batches)
    with torch.no_grad(), own_buffers(model):
        expected = [model(batch) for batch in batches]
    for index in (2, 0, 1):
        assert torch.equal(recording[index].run(model), expected[index])
    assert model.late is None
    after = dict(model.named_buffers())
    assert all(after[name] is b and torch.equal(b, values) for name, (b, values) in before.items())


def test_a_cache_among_the_arguments_does_not_grow() -> None:
    class Cached(nn.Module):
        def forward(self, x: Tensor, cache: Any) -> int:
            cache.kept.append(x)
            return len(cache.kept)

    class Cache:
        def __init__(self) -> None:
            self.kept: list[Tensor] = []

    cache = Cache()
    model = Cached()
    first, second = recorded(model, [torch.ones(1), torch.ones(1)], lambda batch: model(batch, cache))
    assert [call.run(model) for call in (second, second, first)] == [2, 2, 1]


def test_random_numbers_are_the_same_each_time_and_the_callers_go_on() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model = Noisy()
    (call,) = recorded(model, [torch.zeros(3)])
    state = torch.get_rng_state()
    assert torch.equal(call.run(model), call.run(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_that_do_not_count_are_left_out() -> None:
    model = net()

    def run_pass(look: Look) -> None:
        for on in (True, False):
            look(on)
            model(ids()[0])

    assert len(record(model, run_pass)) == 1


def test_a_call_that_fails_does_not_hide_the_next() -> None:
    model = net()

    def run(batch: Tensor) -> None:
        with pytest.raises(IndexError):
            model(batch + 1000)
        model(batch)

    assert len(recorded(model, ids()[:1], run)) == 2


def test_no_call_is_an_error() -> None:
    with pytest.raises(QawareError, match="no batch called the model"):
        recorded(net(), ids(), lambda batch: None)
