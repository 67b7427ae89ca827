"""The float model beside the one that is rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from rounded import ids, net, prepare, recipe
from torch import Tensor, nn

from qaware.engines.fake_quant import set_fake_quant
from qaware.layers import float_twin
from qaware.rounding.beside import Beside


def ran(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids()[0])
    return out


@pytest.mark.parametrize("with_twin", [False, True])
def test_it_computes_in_float_what_it_did(with_twin: bool) -> None:
    model = net()
    expected = ran(copy.deepcopy(model))
    prepare(model, recipe("gptq"))
    set_fake_quant(model, True)
    beside = Beside(model, float_twin(model) if with_twin else None)
    for name in ("up", "embed"):
        beside.keep(name)
        model.get_submodule(name).weight.data.mul_(2)
    model.up.bias.data.add_(1)
    rounded = ran(model)
    with beside.running():
        assert torch.equal(ran(model), expected)
    assert torch.equal(ran(model), rounded)
    assert not torch.equal(rounded, expected)


def test_what_is_forgotten_stays_rounded() -> None:
    model = net()
    prepare(model, recipe("gptq"))
    beside = Beside(model, None)
    before = model.up.weight.detach().clone()
    beside.keep("up")
    model.up.weight.data.mul_(2)
    beside.forget("up")
    with beside.running():
        assert torch.equal(model.up.weight, 2 * before)


def test_of_a_table_only_the_rows_that_are_looked_up_are_kept() -> None:
    model = net()
    expected = ran(copy.deepcopy(model))
    prepare(model, recipe("gptq"))
    set_fake_quant(model, True)
    beside = Beside(model, None)
    used = ids()[0].unique()
    assert len(used) < len(model.embed.weight)
    beside.keep("embed", used)
    model.embed.weight.data.mul_(2)
    model.embed.weight.data[: int(used[0])] = float("nan")
    table = model.embed.weight.detach().clone()
    with beside.running():
        model.embed.weight.data.nan_to_num_()
        assert torch.equal(ran(model), expected)
    assert torch.equal(model.embed.weight[used], table[used])
