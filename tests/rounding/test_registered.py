"""A user's rounding function in a model, and what is found out about one that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounded import grid, ids, net, quantized, recipe, weights
from torch import Tensor

import qaware
from qaware import rounding_plugins
from qaware.errors import QawareError
from qaware.rounding import rtn
from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.registered import choose
from qaware.roundings import Rtn, parse_steps


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_plugins, "_functions", {})
    monkeypatch.setattr(rounding_plugins, "_steps", {})


def narrower(weight: Tensor, grid: Grid, *, factor: float = 0.8) -> Chosen:
    """Round to nearest on smaller scales."""
    scale, zero_point = grid.qparams(weight)
    scale = grid.legal(scale * factor)
    return Chosen(grid.round(weight, scale, zero_point), scale, zero_point)


def run(function: Callable[..., Any], grid: Grid, weight: Tensor | None = None) -> Chosen:
    qaware.register_rounding("mine", function)
    (step,) = parse_steps("mine")
    return choose(weights() if weight is None else weight, grid, step, None)


def test_it_chooses_the_integers_of_a_model() -> None:
    qaware.register_rounding("narrower", narrower)
    made = quantized(net(), {"narrower": {"factor": 0.7}})
    plain = quantized(net(), "rtn")
    for name, weight in made.weights.items():
        assert torch.equal(weight.scale, plain.weights[name].scale * torch.tensor(0.7))
    assert made.rounding is not None
    assert {layer.method for layer in made.rounding.layers} == {"narrower factor=0.7"}
    prepared = qaware.quantize(net(), recipe({"narrower": {"factor": 0.7}}), calibration=ids())
    assert torch.equal(prepared.module(ids()[0]), made.module(ids()[0]))


def test_moments_come_from_the_calibration_batches() -> None:
    seen: list[bool] = []

    def looks(weight: Tensor, grid: Grid, *, moments: Any) -> Chosen:
        seen.append(moments is not None)
        return rtn.choose(weight, grid, Rtn(), None)

    qaware.register_rounding("looks", looks)
    quantized(net(), "looks")
    assert sorted(seen) == [False, True, True, True, True]  # an embedding's input says nothing


def test_the_weight_may_be_changed() -> None:
    weight = weights()
    before = weight.clone()

    def greedy(weight: Tensor, grid: Grid) -> Chosen:
        chosen = narrower(weight, grid)
        weight.zero_()
        return chosen

    run(greedy, grid(bits=4), weight)
    assert torch.equal(weight, before)


def changed(**changes: Callable[[Chosen], Tensor]) -> Callable[..., Chosen]:
    def function(weight: Tensor, grid: Grid) -> Chosen:
        chosen = narrower(weight, grid)
        fields = {"weight": chosen.weight, "scale": chosen.scale, "zero_point": chosen.zero_point}
        return Chosen(**{**fields, **{key: change(chosen) for key, change in changes.items()}})

    return function


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda weight, grid: weight, "returned Tensor; return a qaware.rounding.base.Chosen"),
        (changed(scale=lambda c: c.scale[:, :1]), r"weight, scale and zero_point are \(12, 64\), \(12, 1\)"),
        (changed(scale=lambda c: c.scale * 1.001), "a scale is not in bfloat16, or too small"),
        (changed(scale=lambda c: c.scale * torch.nan), "a scale is not in bfloat16"),
        (changed(scale=lambda c: -c.scale), "a scale is below zero"),
        (changed(zero_point=lambda c: c.zero_point + 1), "zero points must be integers from 0 to 0 here"),
        (changed(zero_point=lambda c: c.zero_point.float()), "zero points must be integers"),
        (
            changed(weight=lambda c: c.weight + c.scale[0, 0] / 3),
            "weights are not on the grid of their scale",
        ),
        (changed(weight=lambda c: c.weight * 100), "weights are not on the grid"),
        (changed(weight=lambda c: c.weight * torch.nan), "weights are not on the grid"),
    ],
)
def test_what_would_ship_otherwise_is_refused(function: Callable[..., Any], words: str) -> None:
    made = grid(bits=4, group_size=16, scale_dtype="bfloat16")
    with pytest.raises(QawareError, match=rf"^rounding\.mine: {words}"):
        run(function, made)


def test_scales_below_zero_need_an_option_that_says_so() -> None:
    def turned(weight: Tensor, grid: Grid, *, signed: bool = True) -> Chosen:
        scale, zero_point = grid.qparams(weight)
        return Chosen(grid.round(weight, -scale, zero_point), -scale, zero_point)

    chosen = run(turned, grid(bits=4))
    assert bool((chosen.scale < 0).all())


@pytest.mark.parametrize("scheme", [{"bits": 8, "symmetric": False}, {"bits": 2, "levels": "ternary"}])
def test_every_grid(scheme: dict[str, Any]) -> None:
    assert run(narrower, grid(**scheme)).weight.shape == weights().shape
