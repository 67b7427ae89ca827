"""GPTQ against the definition, against round to nearest, and on hard Hessians."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from rounded import SCHEMES, grid, inputs, loss, name_of, seen, weights
from torch import Tensor, nn

from qaware.rounding import gptq, mse, rtn
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.roundings import Gptq, Mse, Rtn

PLAIN = {"polish": 0, "correct": False}


def by_definition(weight: Tensor, made: Grid, hessian: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization, column by column: the inverse of the Hessian of the columns that are
    left."""
    scale, zero_point = made.qparams(weight)
    left, rounded = weight.double(), torch.empty_like(weight)
    hessian = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    for column in range(weight.shape[1]):
        inverse = hessian[column:, column:].inverse()
        rounded[:, column] = made.round(left.float(), scale, zero_point)[:, column]
        error = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, column:] -= error.unsqueeze(1) * inverse[0]
    return rounded


@pytest.mark.parametrize("block", [1, 8, 24, 128])
def test_as_defined_whatever_the_blocks(block: int) -> None:
    made, weight, x = grid(bits=4), weights(width=32), inputs(width=32)
    moments = seen(nn.Linear(32, 12), x)
    # In groups that are whole rows, so that the scales are those of the weight itself.
    step = Gptq(block=block, act_order=False, scales="minmax", damping=0.05, **PLAIN)
    chosen = gptq.choose(weight, made, step, moments)
    assert torch.equal(chosen.weight, by_definition(weight, made, moments.hessian[0], 0.05))


def test_large_inputs_first() -> None:
    made, weight, x = grid(bits=4), weights(width=32), inputs(width=32)
    order = x.square().mean(0).argsort(descending=True)
    step = Gptq(act_order=True, scales="minmax", **PLAIN)
    chosen = gptq.choose(weight, made, step, seen(nn.Linear(32, 12), x))
    straight = dataclasses.replace(step, act_order=False)
    ordered = gptq.choose(weight[:, order], made, straight, seen(nn.Linear(32, 12), x[:, order]))
    assert torch.equal(chosen.weight[:, order], ordered.weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("act_order", [True, False])
def test_less_error_in_the_output_on_every_grid(scheme: dict[str, Any], act_order: bool) -> None:
    made, weight, x = grid(**scheme), weights(), inputs()
    weight[2, 5] = 3
    moments = seen(nn.Linear(64, 12), x)
    chosen = gptq.choose(weight, made, Gptq(act_order=act_order), moments)
    others = [mse.choose(weight, made, Mse(), moments), rtn.choose(weight, made, Rtn(), None)]
    assert loss(weight, chosen.weight, x) < 0.85 * min(loss(weight, other.weight, x) for other in others)
    torch.testing.assert_close(made.round(chosen.weight, chosen.scale, chosen.zero_point), chosen.weight)
    assert torch.equal(chosen.scale, chosen.scale.to(getattr(torch, made.scheme.scale_dtype)).float())


def test_every_option_helps() -> None:
    made, weight, x = grid(bits=3, group_size=16), weights(48), inputs()
    moments = seen(nn.Linear(64, 48), x)

    def found(**options: Any) -> float:
        return loss(weight, gptq.choose(weight, made, Gptq(**options), moments).weight, x)

    assert found(scales="mse", **PLAIN) < found(scales="minmax", **PLAIN)
    assert found(polish=1) < found(polish=0)
    assert found(polish=3) < found(polish=1)
    assert found(signed=True) < found()


def test_scales_of_a_group_follow_what_it_takes_over() -> None:
    made, weight, x = grid(bits=3, group_size=16), weights(), inputs()
    chosen = gptq.choose(weight, made, Gptq(act_order=False, **PLAIN), seen(nn.Linear(64, 12), x))
    before, _ = mse.search(weight, made, Mse(), mse.importance(weight, seen(nn.Linear(64, 12), x)))
    assert torch.equal(chosen.scale[:, 0], before[:, 0])
    assert not torch.equal(chosen.scale[:, 1:], before[:, 1:])


def test_inputs_that_never_were_keep_their_nearest_weights() -> None:
    made, weight, x = grid(bits=4), weights(), inputs()
    x[:, 10:20] = 0
    step = Gptq(act_order=False, scales="minmax", damping=0.0, **PLAIN)
    chosen = gptq.choose(weight, made, step, seen(nn.Linear(64, 12), x))
    nearest = rtn.choose(weight, made, Rtn(), None)
    assert torch.equal(chosen.weight[:, 10:20], nearest.weight[:, 10:20])
    assert "damping" in chosen.note


def test_fewer_samples_than_inputs() -> None:
    made, weight, x = grid(bits=4, group_size=16), weights(), inputs(8)
    chosen = gptq.choose(weight, made, Gptq(damping=0.0), seen(nn.Linear(64, 12), x))
    assert chosen.note.startswith("damping 0.001")
    assert loss(weight, chosen.weight, x) < loss(weight, rtn.choose(weight, made, Rtn(), None).weight, x)


def test_nothing_but_zeros_is_nearest_rounding() -> None:
    made, weight = grid(bits=4, group_size=16), weights()
    step = Gptq(scales="minmax", **PLAIN)
    chosen = gptq.choose(weight, made, step, seen(nn.Linear(64, 12), torch.zeros(5, 64)))
    assert torch.equal(chosen.weight, rtn.choose(weight, made, Rtn(), None).weight)


def test_no_input_is_mse_and_says_so() -> None:
    made, weight = grid(bits=4, group_size=16), weights()
    chosen = gptq.choose(weight, made, Gptq(), None)
    assert torch.equal(chosen.weight, mse.choose(weight, made, Mse(), None).weight)
    assert chosen.note == "mse, as no input was seen"


def test_each_group_of_a_convolution_by_its_own_inputs() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, groups=2)
    x = inputs(60, 8 * 36).view(60, 8, 6, 6)
    weight = conv.weight.detach().flatten(1)
    chosen = gptq.choose(weight, grid(bits=4), Gptq(), seen(conv, x))
    for half in range(2):
        alone = nn.Conv2d(4, 4, 3)
        rows = slice(half * 4, half * 4 + 4)
        found = gptq.choose(weight[rows], grid(bits=4), Gptq(), seen(alone, x[:, rows]))
        torch.testing.assert_close(found.weight, chosen.weight[rows])


def test_makes_up_for_the_rounding_before_it() -> None:
    made, weight = grid(bits=8), weights().clamp(-3, 3)
    exact = inputs(2000)
    x = exact * torch.linspace(0.8, 1.2, 64)
    moments = Moments(nn.Linear(64, 12), beside=True)
    for part, other in zip(x.split(500), exact.split(500), strict=True):
        moments.look(part, other)
    moments.reduce("layer")
    found = {
        c: gptq.choose(weight, made, Gptq(correct=c, damping=1e-4), moments).weight for c in (True, False)
    }
    errors = {c: float((w @ x.T - weight @ exact.T).square().sum()) for c, w in found.items()}
    assert errors[True] < 0.1 * errors[False]


def test_the_same_data_give_the_same_integers() -> None:
    made, weight, x = grid(bits=4, group_size=16), weights(), inputs()
    runs = [gptq.choose(weight, made, Gptq(), seen(nn.Linear(64, 12), x)).weight for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(runs))
