"""Run a rounding function of a user's, and look at what it gives before it becomes a weight."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.rounding.base import Chosen
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.rounding_plugins import function_of
from qaware.roundings import Step

_OFF_GRID = 1e-3
"""Of a step: float32 values are on their grid to 1e-5."""


def choose(weight: Tensor, grid: Grid, step: Step, moments: Moments | None) -> Chosen:
    """What the function that ``step`` names gives.

    Raises:
        QawareError: it is on no grid of the layer, which then would ship other values than these.
    """
    options = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
    if step.needs_data:
        options["moments"] = moments
    chosen = function_of(step.name)(weight.clone(), grid, **options)
    if why := _wrong(chosen, weight, grid, bool(options.get("signed"))):
        raise QawareError(f"rounding.{step.name}: {why}")
    assert isinstance(chosen, Chosen)
    return chosen


def _wrong(chosen: object, weight: Tensor, grid: Grid, signed: bool) -> str | None:
    if not isinstance(chosen, Chosen):
        return f"returned {type(chosen).__name__}; return a qaware.rounding.base.Chosen"
    scale, zero_point = chosen.scale, chosen.zero_point
    like = grid.qparams(weight)[0].shape
    if chosen.weight.shape != weight.shape or scale.shape != like or zero_point.shape != like:
        given = ", ".join(str(tuple(x.shape)) for x in (chosen.weight, scale, zero_point))
        return f"weight, scale and zero_point are {given}, not {tuple(weight.shape)} and twice {tuple(like)}"
    used = chosen.weight.reshape(*like, -1).any(-1)  # zeros are exact with any scale
    if not bool(torch.isfinite(scale).all()) or not torch.equal(grid.legal(scale)[used], scale.float()[used]):
        return f"a scale is not in {grid.scheme.scale_dtype}, or too small; pass scales through grid.legal"
    if not signed and bool((scale <= 0).any()):
        return "a scale is below zero, which not every runtime holds; add an option signed: true"
    return _off_grid(chosen, grid)


def _off_grid(chosen: Chosen, grid: Grid) -> str | None:
    low, high = grid.integers
    allowed = (0, 0) if grid.scheme.symmetric else (low, high)
    if chosen.zero_point.is_floating_point() or not _within(chosen.zero_point, *allowed):
        return f"zero points must be integers from {allowed[0]} to {allowed[1]} here"
    rounded = grid.round(chosen.weight.float(), chosen.scale, chosen.zero_point)
    off = (rounded - chosen.weight).abs().reshape(*chosen.scale.shape, -1).amax(-1)
    if bool((off <= _OFF_GRID * chosen.scale.abs()).all()):  # NaN never is
        return None
    return "weights are not on the grid of their scale; return those of grid.round(weight, scale, zero_point)"


def _within(values: Tensor, low: int, high: int) -> bool:
    return bool(((values >= low) & (values <= high)).all())
