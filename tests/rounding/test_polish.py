"""Coordinate descent: every row gets better, and the best is a fixed point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounded import SCHEMES, grid, inputs, name_of, weights

from qaware.rounding import mse
from qaware.rounding.polish import Problem, polish
from qaware.roundings import Mse


def problem(width: int = 64, **scheme: Any) -> Problem:
    x, weight = inputs(width=width), weights(width=width)
    return Problem(weight, (x.T @ x / len(x)).unsqueeze(0), torch.ones(1, 1), grid(**scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_no_row_gets_worse(scheme: dict[str, Any]) -> None:
    made = problem(**scheme)
    start = mse.choose(made.target, made.grid, Mse(), None)
    before, errors = made.error(start.weight), []
    for times in (1, 3):
        rounded, scale = polish(made, start.weight, start.scale, start.zero_point, times)
        errors.append(made.error(rounded).sum())
        if not made.grid.scheme.per_tensor:
            assert bool((made.error(rounded) <= before).all())
        torch.testing.assert_close(made.grid.round(rounded, scale, start.zero_point), rounded)
        assert torch.equal(scale, scale.to(getattr(torch, made.grid.scheme.scale_dtype)).float())
    assert errors[1] <= errors[0] < before.sum()


def test_not_one_integer_can_be_better_alone() -> None:
    made = problem(32, bits=3)
    start = mse.choose(made.target, made.grid, Mse(), None)
    rounded, scale = start.weight, start.scale
    for _ in range(20):
        rounded, scale = polish(made, rounded, scale, start.zero_point, 1)
    least = made.error(rounded)
    for column in range(32):
        for step in (-1, 1):
            other = rounded.clone()
            other[:, column] += step * scale[:, 0]
            legal = made.grid.round(other, scale, start.zero_point)
            assert bool((made.error(legal) >= least * 0.99999).all())


def test_blocks_of_columns_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(bits=4, group_size=16)
    start = mse.choose(made.target, made.grid, Mse(), None)
    whole, _ = polish(made, start.weight, start.scale, start.zero_point, 1)
    monkeypatch.setattr("qaware.rounding.polish._BLOCK", 24)
    parts, _ = polish(made, start.weight, start.scale, start.zero_point, 1)
    torch.testing.assert_close(parts, whole)


def test_scales_are_those_of_least_squares() -> None:
    made = problem(bits=4, group_size=16)
    start = mse.choose(made.target, made.grid, Mse(), None)
    levels = (start.weight / start.scale.repeat_interleave(16, 1)).round()
    wrong = start.scale * 1.1
    rounded = levels * wrong.repeat_interleave(16, 1)
    fitted, _ = polish(made, rounded, wrong, start.zero_point, 2)
    root = torch.linalg.cholesky(made.hessian[0] + torch.eye(64))
    basis = torch.block_diag(*levels[0].view(4, 16)) @ root
    best = torch.linalg.lstsq(basis.T, (made.target[0] @ root).unsqueeze(1)).solution
    ideal = made.error((levels[0].view(4, 16) * best).view(1, 64).expand(12, 64))[0]
    assert float(made.error(fitted)[0]) <= float(ideal) * 1.001


def test_rows_that_are_fitted_apart_are_fitted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(bits=4, group_size=16)
    start = mse.choose(made.target, made.grid, Mse(), None)
    _, whole = polish(made, start.weight, start.scale, start.zero_point, 2)
    monkeypatch.setattr("qaware.rounding.polish._NUMBERS", 5 * 4**2)  # 5 rows of 4 blocks at a time
    _, parts = polish(made, start.weight, start.scale, start.zero_point, 2)
    torch.testing.assert_close(parts, whole)
    assert not torch.equal(whole, start.scale)
