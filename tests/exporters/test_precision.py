"""Models in half precision, in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import TinyLM, tokens
from torch import nn

from qaware.engines.base import QuantizedModel
from qaware.engines.modules import ModulesEngine
from qaware.exporters.precision import in_float32
from qaware.recipe import Recipe


def convert(model: nn.Module, recipe: str) -> QuantizedModel:
    work = copy.deepcopy(model).eval()
    plan = Recipe.load(recipe).match(work)
    engine = ModulesEngine()
    return engine.convert(engine.prepare(work, plan), plan)


@pytest.mark.parametrize("recipe", ["int4-weight-only", "float16"])
def test_a_model_in_float32_is_its_own(recipe: str) -> None:
    quantized = convert(TinyLM(), recipe)
    assert in_float32(quantized) is quantized.module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["int4-weight-only", "float16"])
def test_only_what_the_plan_stores_in_half_stays_so(recipe: str, dtype: torch.dtype) -> None:
    quantized = convert(TinyLM().to(dtype), recipe)
    module = in_float32(quantized)
    assert module is not quantized.module
    assert module.norm.weight.dtype == torch.float32
    assert quantized.module.norm.weight.dtype == dtype
    assert module(tokens(5)).dtype == torch.float32
    wanted = quantized.weights["qkv"].dequantize()
    weight = module.qkv.weight
    assert weight.dtype == (torch.float16 if recipe == "float16" else torch.float32)
    assert torch.equal((weight if recipe == "float16" else weight.dequantize()).float(), wanted)
