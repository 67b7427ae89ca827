"""What enters the layers of a model when a recording runs again."""

from __future__ import annotations

import pytest
import torch
from recorded import recorded
from rounded import WIDTH, ids, net
from torch import Tensor, nn

from qaware.rounding.recording import Recording
from qaware.rounding.replaying import groups_in_order, replay


def entered(
    model: nn.Module, recording: Recording, names: list[str], once: bool = False
) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    replay(model, recording, names, lambda name, x: found.append((name, x)), once)
    return found


def test_a_replay_shows_what_entered() -> None:
    model = net()
    recording = recorded(model, ids())
    found = entered(model, recording, ["up", "head"])
    assert [name for name, _ in found] == ["up", "head"] * 3
    assert torch.equal(found[0][1], model.embed(ids()[0]))


def test_once_stops_after_the_last_layer() -> None:
    model = net()
    recording = recorded(model, ids())
    model.head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    assert [n for n, _ in entered(model, recording, ["gate", "up"], once=True)] == ["gate", "up"] * 3


def test_layers_that_take_the_same_tensor_are_together() -> None:
    model = net()
    groups = groups_in_order(model, recorded(model, ids()), ["head", "up", "down", "gate"])
    assert [(group.names, group.once) for group in groups] == [
        (("up", "gate"), True),
        (("down",), True),
        (("head",), True),
    ]


class Experts(nn.Module):
    """Sends each batch to one of its layers; another runs twice, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, which: int) -> Tensor:
        return self.twice(self.twice(self.experts[which](x)))


def test_layers_that_run_in_other_calls_are_apart() -> None:
    model, x, which = Experts(), torch.randn(2, 4), iter((0, 1))
    recording = recorded(model, [x, x], lambda batch: model(batch, which=next(which)))
    names = ["never", "twice", "experts.0", "experts.1"]
    groups = groups_in_order(model, recording, names)
    assert [(group.names, group.once) for group in groups] == [
        (("experts.0",), True),
        (("experts.1",), True),
        (("twice",), False),
    ]


def test_layers_that_part_later_are_apart() -> None:
    class Late(Experts):
        def forward(self, x: Tensor, *, which: int) -> Tensor:
            return self.experts[0](x) + self.experts[1](x * which if which else x)

    model, x, which = Late(), torch.randn(2, 4), iter((0, 1))
    recording = recorded(model, [x, x], lambda batch: model(batch, which=next(which)))
    assert [g.names for g in groups_in_order(model, recording, ["experts.0", "experts.1"])] == [
        ("experts.0",),
        ("experts.1",),
    ]


def test_a_step_that_goes_past_forward() -> None:
    model = net()
    recording = recorded(model, ids(), lambda batch: model.head(model.embed(batch) + 1))
    assert [call.module for call in recording] == ["embed", "head"] * 3
    (group,) = groups_in_order(model, recording, ["head", "up"])
    assert group.names == ("head",)
    (_, x), *_ = entered(model, recording, ["head"])
    assert x.shape == (4, 16, WIDTH)
