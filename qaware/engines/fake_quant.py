"""The switches of a prepared model's fake-quantizers."""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization.qat import IntxFakeQuantizer

from qaware.engines.activation_fake_quant import StaticFakeQuantizer
from qaware.engines.weight_fake_quant import Float16FakeQuantizer, Marked, WeightFakeQuantizer


def set_fake_quant(model: nn.Module, enabled: bool) -> None:
    """Switch every fake-quantizer of a prepared model; off means the float computation."""
    for module in model.modules():
        if isinstance(module, (IntxFakeQuantizer, Float16FakeQuantizer, StaticFakeQuantizer)):
            module.enabled = enabled


def set_softness(model: nn.Module, softness: float) -> None:
    """How soft every weight's rounding is, from 1 (none) to 0 (all of it)."""
    for module in model.modules():
        if isinstance(module, WeightFakeQuantizer):
            if softness <= 0:
                module.softness = None
            elif module.softness is None:
                module.softness = torch.tensor(softness)
            else:
                module.softness.fill_(softness)


def is_rounding(model: nn.Module) -> bool:
    """Whether the forward pass of a prepared model rounds; False for a float model."""
    return any(bool(module.enabled) for module in model.modules() if isinstance(module, Marked))
