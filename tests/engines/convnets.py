"""Small convolution networks, and how the tests quantize them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.calibration import calibrate
from qaware.engines.base import QuantizedModel
from qaware.engines.eager import EagerEngine
from qaware.engines.example import Example
from qaware.plan import Plan
from qaware.recipe import Recipe

STATIC = {"bits": 8, "activation": "int8-static"}


class Block(nn.Module):
    """A residual block with in-place ReLUs and an in-place addition, as they are often written."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(channels, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class Residual(nn.Module):
    """Everything that is fused or joined: two blocks, a concatenation, a depthwise layer, two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block1 = Block(8, 8)
        self.block2 = Block(8, 12, 2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.hidden = nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.block2(self.block1(self.stem(x * scale)))
        x = torch.cat([F.max_pool2d(x, 2), self.depthwise(x)[:, :, ::2, ::2]], 1)
        return self.head(F.relu(self.hidden(F.adaptive_avg_pool2d(x, 1).flatten(1))))


class Noisy(nn.Module):
    """Adds something in training only, before the addition that is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.training:
            y = y + torch.full_like(y, -5.0)
        return F.relu(self.b(y) + y)


class Twins(nn.Module):
    """A block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Noisy()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) - self.block(-x)


def residual(seed: int = 0) -> Residual:
    """With batch norms that have seen something."""
    torch.manual_seed(seed)
    return settle(Residual())


def settle(model: Any) -> Any:
    """Give batch norms statistics and weights that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def images(count: int = 8, size: int = 12, seed: int = 1) -> Tensor:
    """Float images (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def laid_out(model: nn.Module, x: Tensor, **scheme: Any) -> Plan:
    """Every layer static int8, or of ``scheme``."""
    rules = [{"name": "*", "scheme": {**STATIC, **scheme}}]
    plan = Recipe.from_dict({"name": "test", "rules": rules}).match(model)
    return EagerEngine().lay_out(model, plan, Example((x,)))


def prepared(model: nn.Module, plan: Plan, x: Tensor) -> Any:
    """A prepared, calibrated copy in evaluation mode."""
    copied = EagerEngine().prepare(copy.deepcopy(model), plan).eval()
    with torch.no_grad():
        calibrate(copied, lambda look: copied(x))
    return copied


def converted(model: nn.Module, plan: Plan) -> QuantizedModel:
    """The converted copy of a prepared model."""
    return EagerEngine().convert(copy.deepcopy(model), plan)


def sqnr(exact: Tensor, rounded: Tensor) -> float:
    """Signal to quantization noise in dB."""
    return float(10 * torch.log10(exact.square().sum() / (exact - rounded).square().sum()))
