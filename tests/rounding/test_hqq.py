"""Half-quadratic quantization: a smaller p-norm of the error, whatever the size of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounded import SCHEMES, grid, name_of, weights
from torch import Tensor

from qaware.rounding import hqq, mse, rtn
from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.roundings import Hqq, Mse, Rtn


def norms(made: Grid, weight: Tensor, chosen: Chosen, p: float = 0.7) -> Tensor:
    """Of the error of each block."""
    return made.blocks(chosen.weight - weight).abs().pow(p).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_no_block_is_worse_than_nearest(scheme: dict[str, Any]) -> None:
    made, weight = grid(**scheme), weights()
    found = norms(made, weight, hqq.choose(weight, made, Hqq(), None))
    nearest = norms(made, weight, rtn.choose(weight, made, Rtn(), None))
    assert bool((found <= nearest * 1.0001).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_most_blocks_are_better(symmetric: bool) -> None:
    made, weight = grid(bits=4, group_size=32, symmetric=symmetric), weights(64)
    found = norms(made, weight, hqq.choose(weight, made, Hqq(), None))
    nearest = norms(made, weight, rtn.choose(weight, made, Rtn(), None))
    assert float((found < nearest * 0.999).float().mean()) > 0.7


def test_a_far_value_counts_less_than_in_squares() -> None:
    made, weight = grid(bits=3), weights(64)
    chosen = hqq.choose(weight, made, Hqq(), None)
    squares = mse.choose(weight, made, Mse(), None)
    assert float(norms(made, weight, chosen).sum()) < float(norms(made, weight, squares).sum())


def test_the_size_of_the_weights_does_not_matter() -> None:
    made, weight = grid(bits=4, group_size=16), weights()
    small = hqq.choose(weight / 1024, made, Hqq(), None)
    chosen = hqq.choose(weight, made, Hqq(), None)
    live = torch.arange(12) != 1
    torch.testing.assert_close(small.scale[live] * 1024, chosen.scale[live])
