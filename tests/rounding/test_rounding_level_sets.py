"""Every rounding method on registered sets of levels: what it chooses ships as it is, and loses less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from registered_levels import SCHEMES
from torch import Tensor, nn

import qaware
from qaware.engines.base import QuantizedModel
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.errors import QawareError
from qaware.rounding import mse
from qaware.rounding.grid import Grid
from qaware.roundings import Mse
from qaware.scheme import Scheme

each = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.levels)
ROUNDINGS: list[Any] = [
    "rtn",
    "mse",
    {"mse": {"signed": True}},
    {"percentile": {"share": 0.95}},
    "hqq",
    "gptq",
    {"gptq": {"signed": True, "act_order": True}},
    ["awq", "mse", "bias-correction"],
]


def inputs() -> list[Tensor]:
    return list(torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(1)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8, bias=False)).eval()


def quantize(scheme: Scheme, rounding: Any) -> QuantizedModel:
    rules = [{"type": "Linear", "scheme": scheme.to_dict()}]
    return qaware.quantize(net(), {"rounding": rounding, "rules": rules}, calibration=inputs())


@each
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_what_was_chosen_ships(scheme: Scheme, rounding: Any) -> None:
    """The converted model is that of the integers and scales, and they are on the levels."""
    quantized = quantize(scheme, rounding)
    plain = net()
    for name, weight in quantized.weights.items():
        assert set(weight.data.unique().tolist()) <= set(scheme.level_set or ())
        layer: Any = plain.get_submodule(name)
        layer.weight.data.copy_(weight.dequantize())
        if layer.bias is not None:
            layer.bias.data.copy_(quantized.module.get_submodule(name).bias)  # type: ignore[arg-type]
    for x in inputs():
        torch.testing.assert_close(quantized.module(x), plain(x), rtol=1e-5, atol=1e-6)


@each
def test_methods_that_look_lose_less(scheme: Scheme) -> None:
    lines = quantize(scheme, "gptq").rounding.layers
    assert all(line.error < 0.9 * line.rtn_error for line in lines)
    lines = quantize(scheme, "mse").rounding.layers
    assert all(line.error < line.rtn_error for line in lines)


@each
def test_scales_below_zero_are_tried_where_they_are_another_grid(scheme: Scheme) -> None:
    grid = Grid(WeightFakeQuantizer(scheme))
    assert grid.lopsided == (scheme.levels == "test-powers")
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    weight[:, ::32] = 5.0  # a far one on the side where there are fewer levels
    chosen = mse.choose(weight, grid, Mse(signed=True), None)
    assert bool((chosen.scale < 0).any()) == grid.lopsided
    assert torch.equal(grid.round(chosen.weight, chosen.scale, chosen.zero_point), chosen.weight)


def test_q4_0_is_for_all_integers() -> None:
    with pytest.raises(QawareError, match="q4-0 is for symmetric integers"):
        quantize(SCHEMES[0], "q4-0")
