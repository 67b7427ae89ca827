"""The scale search against brute force, and against round to nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounded import SCHEMES, grid, inputs, name_of, seen, weights
from torch import Tensor, nn

from qaware.rounding import mse, rtn
from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.roundings import Mse, Rtn


def errors(made: Grid, weight: Tensor, chosen: Chosen) -> Tensor:
    """Squared error of each block."""
    return made.blocks(chosen.weight - weight).square().sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("seed", range(3))
def test_no_block_is_worse_than_nearest_and_most_are_better(scheme: dict[str, Any], seed: int) -> None:
    made, weight = grid(**scheme), weights(seed=seed)
    nearest = errors(made, weight, rtn.choose(weight, made, Rtn(), None))
    found = errors(made, weight, mse.choose(weight, made, Mse(), None))
    assert bool((found <= nearest * 1.000001).all())
    # At 8 bits a weight of 12 rows leaves little to gain, and one huge value decides a whole tensor's scale.
    if scheme["bits"] < 7:
        assert float((found < nearest * 0.999).float().mean()) > 0.6


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_what_is_chosen_is_on_the_grid(scheme: dict[str, Any]) -> None:
    made, weight = grid(**scheme), weights()
    chosen = mse.choose(weight, made, Mse(), None)
    assert torch.equal(chosen.scale, chosen.scale.to(getattr(torch, made.scheme.scale_dtype)).float())
    assert chosen.zero_point.dtype == torch.int32
    torch.testing.assert_close(made.round(chosen.weight, chosen.scale, chosen.zero_point), chosen.weight)
    if made.scheme.levels != "stretched":
        assert not bool(chosen.weight[1].any())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_near_the_best_of_a_fine_search(bits: int) -> None:
    made, weight = grid(bits=bits, group_size=16), weights()
    found = errors(made, weight, mse.choose(weight, made, Mse(), None)).sum()
    blocks = made.blocks(weight)
    zero_point = torch.zeros_like(blocks[:, :1], dtype=torch.int32)
    best = torch.full((len(blocks),), torch.inf)
    for factor in torch.linspace(0.05, 1.3, 3000).tolist():
        scale = made.legal(blocks.abs().amax(1, keepdim=True) / 2 ** (bits - 1) * factor)
        best = best.minimum((made.round(blocks, scale, zero_point) - blocks).square().sum(1))
    assert float(found) < 1.02 * float(best.sum())


def test_inputs_say_what_counts() -> None:
    made, weight, x = grid(bits=3, group_size=16), weights(), inputs()
    moments = seen(nn.Linear(64, 12), x)
    power = moments.hessian[0].diagonal()
    plain = mse.choose(weight, made, Mse(), None).weight - weight
    weighted = mse.choose(weight, made, Mse(), moments).weight - weight
    assert float((weighted.square() * power).sum()) < 0.9 * float((plain.square() * power).sum())


def test_each_group_of_a_convolution_has_its_own_inputs() -> None:
    conv = nn.Conv1d(4, 6, 1, groups=2)
    moments = seen(conv, torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]))
    counts = mse.importance(conv.weight.flatten(1), moments)
    assert counts.tolist() == [[1.0, 4.0]] * 3 + [[9.0, 16.0]] * 3


def test_asymmetric_ranges_are_drawn_in_at_the_end_that_pays() -> None:
    torch.manual_seed(0)
    made, weight = grid(bits=3, symmetric=False), torch.rand(1, 1024)
    weight[0, 0] = -2.0
    chosen = mse.choose(weight, made, Mse(), None)
    low, high = (made.integers - chosen.zero_point.numpy()).flatten() * float(chosen.scale)
    assert low > -1.0
    assert high > 0.8


def test_scales_below_zero_turn_the_longer_side() -> None:
    made, weight = grid(bits=3, group_size=16), weights(64)
    plain = errors(made, weight, mse.choose(weight, made, Mse(), None))
    signed = mse.choose(weight, made, Mse(signed=True), None)
    found = errors(made, weight, signed)
    assert bool((found <= plain * 1.000001).all())
    assert float(found.sum()) < 0.97 * float(plain.sum())
    assert bool((signed.scale < 0).any())


@pytest.mark.parametrize(
    "scheme", [{"bits": 2, "levels": "ternary"}, {"bits": 4, "symmetric": False}], ids=name_of
)
def test_grids_that_have_no_longer_side_keep_scales_above_zero(scheme: dict[str, Any]) -> None:
    chosen = mse.choose(weights(), grid(**scheme), Mse(signed=True), None)
    assert bool((chosen.scale > 0).all())
