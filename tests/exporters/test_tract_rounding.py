"""Rounding to a grid in float32, as tract runs it, against torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tract_tools import EXPORTER

from qaware.engines.base import ActivationRange, QuantizedModel
from qaware.engines.static_integer import Requantize
from qaware.exporters.signature import Signature, TensorSpec
from qaware.plan import Plan
from qaware.recipe import Recipe

SIGNATURE = Signature((TensorSpec("x", "float32", ("n", 9)),), {"n": (1, 4000)})
FLOAT = Recipe.load({"name": "float", "rules": [{"name": "*", "scheme": None}]})


class Rounding(nn.Module):
    """One rounding, twice, between functions that see what came out."""

    def __init__(self, grid: ActivationRange) -> None:
        super().__init__()
        self.first, self.again = Requantize(grid), Requantize(grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(F.relu(self.first(F.relu(x)))) + self.first(x)


def values(grid: ActivationRange) -> Tensor:
    """Of every size: halves between two integers of the grid, and far beyond it."""
    halves = (torch.arange(-600, 601) / 2) * grid.scale
    large = torch.tensor([1e5, -1e5, 1e7, -1e7, 1e9, -1e9, 0.0, -0.0, 1e-30])
    random = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 90 * grid.scale
    every = torch.cat([halves, large, random])
    return every[: len(every) // 9 * 9].view(-1, 9)


@pytest.mark.parametrize("zero_point", [-128, -5, 0, 127])
def test_floats_are_rounded_as_torch_rounds_them(tmp_path: Path, zero_point: int) -> None:
    # A power of two, so that halves are exact.
    grid = ActivationRange(0.125, zero_point)
    model = Rounding(grid).eval()
    x = values(grid)
    path = tmp_path / "a.nnef.tgz"
    EXPORTER.export(QuantizedModel(model, Plan(FLOAT, ()), {}), (x[:5],), SIGNATURE, path)
    assert torch.equal(EXPORTER.open(path, SIGNATURE)(x), model(x))


def test_no_cast_to_a_grid_is_left(tmp_path: Path) -> None:
    import tarfile

    path = tmp_path / "a.nnef.tgz"
    quantized = QuantizedModel(Rounding(ActivationRange(0.1, -128)).eval(), Plan(FLOAT, ()), {})
    EXPORTER.export(quantized, (torch.zeros(5, 9),), SIGNATURE, path)
    with tarfile.open(path) as archive:
        graph = archive.extractfile("graph.nnef").read().decode().partition("graph network")[2]
    assert "tract_core_cast" not in graph
    assert graph.count("max(") == 2, "the second of two roundings in a row is none"
