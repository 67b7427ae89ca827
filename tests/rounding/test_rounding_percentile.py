"""The range of a share of the weights, against numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rounded import SCHEMES, grid, name_of, weights

from qaware.rounding import percentile, rtn
from qaware.roundings import Percentile, Rtn


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_by_hand(share: float) -> None:
    made, weight = grid(bits=4, group_size=16), weights()
    chosen = percentile.choose(weight, made, Percentile(share), None)
    reach = np.quantile(weight.abs().numpy().reshape(-1, 16), share, axis=1)
    expected = made.legal(torch.tensor(reach, dtype=torch.float32) / 7.5)
    torch.testing.assert_close(chosen.scale.flatten(), expected)


def test_both_ends_by_hand() -> None:
    made, weight = grid(bits=4, symmetric=False), weights()
    chosen = percentile.choose(weight, made, Percentile(0.9), None)
    least, most = (np.quantile(weight.numpy(), q, axis=1) for q in (0.05, 0.95))
    scale = made.legal(torch.tensor((most - least) / 15, dtype=torch.float32))
    torch.testing.assert_close(chosen.scale.flatten(), scale)
    zero = (-8 - (torch.tensor(least, dtype=torch.float32) / scale).round()).clamp(-8, 7)
    assert torch.equal(chosen.zero_point.flatten(), zero.int())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_every_grid_takes_it(scheme: dict[str, Any]) -> None:
    made, weight = grid(**scheme), weights()
    chosen = percentile.choose(weight, made, Percentile(), None)
    assert torch.equal(chosen.scale, made.legal(chosen.scale))
    torch.testing.assert_close(made.round(chosen.weight, chosen.scale, chosen.zero_point), chosen.weight)


def test_all_of_the_weights_is_nearest_rounding() -> None:
    made, weight = grid(bits=4, group_size=16), weights()
    chosen = percentile.choose(weight, made, Percentile(1.0), None)
    torch.testing.assert_close(chosen.weight, rtn.choose(weight, made, Rtn(), None).weight)


def test_one_far_value_costs_itself_and_not_its_row() -> None:
    made, weight = grid(bits=8), weights(width=512)
    weight[2, 5] = 3000
    chosen = percentile.choose(weight, made, Percentile(0.99), None)
    others = torch.arange(512) != 5
    nearest = rtn.choose(weight, made, Rtn(), None).weight
    found, left = ((w - weight)[2, others].square().mean() for w in (chosen.weight, nearest))
    assert float(found) < 0.1 * float(left)
