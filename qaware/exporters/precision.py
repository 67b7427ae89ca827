"""Models in half precision, for runtimes that compute between layers in float32."""

from __future__ import annotations

import copy

import torch
from torch import nn

from qaware.engines.base import QuantizedModel
from qaware.engines.integer import Float16Embedding

_HALF = (torch.float16, torch.bfloat16)


def in_float32(quantized: QuantizedModel) -> nn.Module:
    """The converted model; of one in half precision a copy with the same integers in float32."""
    floats = {f"{name}.weight" for name, weight in quantized.weights.items() if weight.scheme.is_float}
    named = [*quantized.module.named_parameters(), *quantized.module.named_buffers()]
    if all(t.dtype not in _HALF or name in floats for name, t in named):
        return quantized.module
    widened = copy.deepcopy(quantized)
    to_float32(widened)
    return widened.module


def to_float32(quantized: QuantizedModel) -> None:
    """Parameters and buffers in half precision to float32, in place; float16 weights of the plan stay."""
    for name, part in quantized.module.named_modules():
        planned = name in quantized.weights and quantized.weights[name].scheme.is_float
        if isinstance(part, Float16Embedding):
            part.dtype = torch.float32
        for key, value in list(part.named_parameters(recurse=False)):
            if value.dtype in _HALF and not (planned and key == "weight"):
                setattr(part, key, nn.Parameter(value.detach().to(torch.float32), requires_grad=False))
        for key, buffer in list(part.named_buffers(recurse=False)):
            if buffer.dtype in _HALF:
                setattr(part, key, buffer.float())
