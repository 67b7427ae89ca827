"""Weights, grids and small networks that the tests of rounding share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qaware
from qaware.engines.base import QuantizedModel
from qaware.engines.modules import ModulesEngine
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.plan import Plan
from qaware.recipe import Recipe
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.scheme import Scheme

VOCABULARY, WIDTH = 24, 32

SCHEMES: list[dict[str, Any]] = [
    *({"bits": bits} for bits in range(1, 9)),
    {"bits": 4, "group_size": 16, "scale_dtype": "bfloat16"},
    {"bits": 3, "group_size": 8, "scale_dtype": "float16"},
    {"bits": 4, "group_size": 16, "symmetric": False},
    {"bits": 8, "symmetric": False},
    {"bits": 2, "levels": "ternary"},
    {"bits": 2, "group_size": 16, "levels": "stretched"},
    {"bits": 8, "activation": "int8-static"},
    {"bits": 8, "activation": "int8-static", "per_tensor": True},
]


def grid(narrow: bool = False, **scheme: Any) -> Grid:
    """Of a layer with this scheme."""
    return Grid(WeightFakeQuantizer(Scheme(**scheme), narrow))


def name_of(scheme: dict[str, Any]) -> str:
    """For test ids."""
    return Scheme(**scheme).label


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int = 12, width: int = 64, seed: int = 0) -> Tensor:
    """float32 (rows, width) with long tails, a row of zeros and a row with one huge value."""
    weight = torch.randn(rows, width, generator=generator(seed))
    weight = weight * (0.3 + weight.abs())
    weight[1] = 0
    weight[2, 5] = 300
    return weight


def inputs(samples: int = 512, width: int = 64, seed: int = 1) -> Tensor:
    """float32 (samples, width) that hang together, some columns much larger than others."""
    mixing = torch.randn(width, width, generator=generator(seed + 100)) * 0.5 + torch.eye(width)
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator(seed))]
    return torch.randn(samples, width, generator=generator(seed)) @ mixing * sizes


def seen(layer: nn.Module, *batches: Tensor) -> Moments:
    """The moments of a layer that saw these."""
    moments = Moments(layer)
    for batch in batches:
        moments.look(batch)
    moments.reduce("layer")
    return moments


def loss(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    """Squared error of the output."""
    return float(((rounded - weight) @ x.T).square().sum())


class Net(nn.Module):
    """Embedding, two layers that take the same tensor, one with a bias, and a head that may share weights."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.gate = nn.Linear(WIDTH, 48, bias=False)
        self.up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.sigmoid(self.gate(x)) * self.up(x)))


def net(seed: int = 0, tie: bool = False) -> Net:
    torch.manual_seed(seed)
    return Net(tie).eval()


def ids(seed: int = 0, batches: int = 3) -> list[Tensor]:
    """int64 (4, 16) each."""
    return [torch.randint(0, VOCABULARY, (4, 16), generator=generator(seed + i)) for i in range(batches)]


def recipe(rounding: Any, scheme: dict[str, Any] | None = None, **more: Any) -> Recipe:
    """Every layer of a scheme, int4 in groups of 16 unless told otherwise."""
    scheme = scheme or {"bits": 4, "group_size": 16}
    return Recipe.from_dict(
        {"name": "test", "rounding": rounding, "rules": [{"name": "*", "scheme": scheme}], **more}
    )


def quantized(model: nn.Module, rounding: Any, scheme: dict[str, Any] | None = None) -> QuantizedModel:
    """By the front door, on three batches."""
    return qaware.quantize(model, recipe(rounding, scheme), calibration=ids(), calibration_batches=3)


def prepare(model: nn.Module, made: Recipe) -> Plan:
    """In place, by the modules engine."""
    plan = made.match(model)
    ModulesEngine().prepare(model, plan)
    return plan
