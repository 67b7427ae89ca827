"""A rounder is made of a float model and used on the prepared one."""

from __future__ import annotations

import pytest
import torch
from rounded import net, prepare, recipe
from torch import nn

from qaware.errors import QawareError
from qaware.rounding.rounder import Rounder


def test_data_are_asked_for_only_where_a_step_needs_them() -> None:
    model = net()
    made = recipe("mse")
    rounder = Rounder(model, made.match(model), lambda: pytest.fail("recorded"))
    prepare(model, made)
    with torch.no_grad():
        assert len(rounder.round(model).layers) == 5


def test_a_parted_model_gets_another_plan() -> None:
    model = net(tie=True)
    rules = [{"role": "embedding", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": {"bits": 4}}]
    plan = type(recipe("mse")).from_dict({"name": "t", "rounding": "mse", "rules": rules}).match(model)
    rounder = Rounder(model, plan, lambda: [])
    assert rounder.parted == {"head": "embed"}
    assert not any(d.tied_to for d in rounder.plan.decisions)


def test_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 16)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(QawareError, match="this model has adapters; merge them first"):
        Rounder(model, recipe("gptq").match(model), lambda: [])
