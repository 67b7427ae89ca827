from __future__ import annotations

import pytest
import torch
from convnets import Residual, images
from torch import Tensor, nn

from qaware.engines.dataflow import Call, record


def names(calls: list[Call] | tuple[Call, ...]) -> list[str]:
    return [call.name.rpartition(".")[2] if call.module is None else call.name for call in calls]


class Inside(nn.Module):
    """Adds and has no children."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + self.bias


def test_calls_come_in_order_with_their_owners() -> None:
    model = Residual()
    flow = record(model, lambda: model(images()))
    assert names(flow.calls)[:4] == ["mul", "stem.0", "stem.1", "stem.2"]
    adds = [call for call in flow.calls if call.name.endswith("add_")]
    assert [call.owner for call in adds] == ["block1", "block2"]
    assert flow.of("block1.relu")[0].owner == "block1"
    assert flow.outputs == {flow.calls[-1].outputs[0]}


def test_a_tensor_written_in_place_is_another_value() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    flow = record(model, lambda: model(torch.randn(2, 4)))
    first, relu, last = flow.calls
    assert first.outputs == relu.inputs != relu.outputs == last.inputs
    assert flow.consumers(first.outputs[0]) == [relu]


def test_what_a_leaf_does_inside_is_not_recorded_but_its_additions_are_known() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Inside())
    flow = record(model, lambda: model(torch.randn(2, 4)))
    assert names(flow.calls) == ["0", "1"]
    assert flow.scopes == ("1",)


def test_the_model_is_left_as_it_was() -> None:
    model = Residual().train()
    model.stem[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record(model, lambda: model(images()))
    assert model.training
    assert not model.stem[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_leaves_no_hook() -> None:
    model = Residual()
    with pytest.raises(RuntimeError):
        record(model, lambda: model(torch.randn(1, 2, 4, 4)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
