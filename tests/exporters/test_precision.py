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


def test_a_bias_beside_a_float16_weight_is_widened_too() -> None:
    quantized = convert(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).half(), "float16")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    module = in_float32(quantized)
    assert module[0].weight.dtype == torch.float16
    assert module(x).dtype == torch.float32
