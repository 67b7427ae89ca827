"""One layer, some of its rows at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounded import inputs, prepare, recipe, seen
from torch import Tensor, nn

import qaware
from qaware.errors import QawareError
from qaware.rounding import gptq, rtn
from qaware.rounding import grid as grids
from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.one_layer import round_layer
from qaware.roundings import Rtn

SCHEME = {"bits": 4, "group_size": 32, "scale_dtype": "float16"}
METHODS: list[Any] = ["rtn", "mse", "percentile", "hqq", "q4-0", "gptq", ["gptq", "bias-correction"]]


def prepared(method: Any, rows: int = 50) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, rows))
    prepare(model, recipe(method, SCHEME))
    return model[0]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_parts_are_rounded_as_the_whole_is(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, lines = [], []
    for numbers in (1 << 18, 7 * 64):  # 50 rows at once, and 7
        monkeypatch.setattr(grids, "_NUMBERS", numbers)
        monkeypatch.setattr(grids, "_LEAST_ROWS", 1)
        layer = prepared(method)
        lines.append(round_layer("up", layer, [], recipe(method, SCHEME), seen(layer, inputs())))
        layers.append(layer)
    whole, parts = layers
    torch.testing.assert_close(parts.weight, whole.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts.bias, whole.bias, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(
        parts.weight_fake_quantizer.fixed, whole.weight_fake_quantizer.fixed, strict=True
    ):
        assert torch.equal(ours, theirs)
    assert lines[1].error == pytest.approx(lines[0].error, rel=1e-4)
    assert lines[1].rtn_error == pytest.approx(lines[0].rtn_error, rel=1e-4)


def test_the_hessian_is_factored_once_for_all_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "_NUMBERS", 7 * 64)
    monkeypatch.setattr(grids, "_LEAST_ROWS", 1)
    made: list[Tensor] = []
    plain = gptq._inverse_factor
    monkeypatch.setattr(gptq, "_inverse_factor", lambda *given: made.append(given[0]) or plain(*given))
    layer, other = prepared("gptq"), prepared("gptq", 20)
    moments = seen(layer, inputs())
    for each in (layer, other):
        round_layer("up", each, [], recipe("gptq"), moments)
    assert len(made) == 1


@pytest.fixture
def whole_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []

    def nearest(weight: Tensor, grid: Grid) -> Chosen:
        found.append(len(weight))
        return rtn.choose(weight, grid, Rtn(), None)

    monkeypatch.setattr(grids, "_NUMBERS", 7 * 64)
    monkeypatch.setattr(grids, "_LEAST_ROWS", 1)
    qaware.register_rounding("whole-rows", nearest)
    return found


def test_a_users_function_gets_the_whole_weight(whole_rows: list[int]) -> None:
    round_layer("up", prepared("whole-rows"), [], recipe("whole-rows"), None)
    assert whole_rows == [50]


def test_the_error_is_that_of_the_output() -> None:
    layer, x = prepared("rtn"), inputs()
    before = layer.weight.detach().clone()
    line = round_layer("up", layer, [], recipe("rtn"), seen(layer, x))
    lost, there = ((w @ x.T).square().sum() for w in (layer.weight.detach() - before, before))
    assert line.error == pytest.approx(float(lost / there), rel=1e-3)
    assert line.rtn_error == pytest.approx(line.error)


def test_ties_get_the_scales_too() -> None:
    layer, head = prepared("mse"), prepared("mse")
    head.weight = layer.weight
    round_layer("up", layer, [head], recipe("mse"), None)
    assert all(map(torch.equal, head.weight_fake_quantizer.fixed, layer.weight_fake_quantizer.fixed))


def test_a_broken_weight_names_the_layer() -> None:
    layer = prepared("rtn")
    layer.weight.data[49, 3] = float("inf")
    with pytest.raises(QawareError, match=r"blocks\.3\.up: its weight has NaN or infinity"):
        round_layer("blocks.3.up", layer, [], recipe("rtn"), None)
