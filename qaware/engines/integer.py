"""Layers that hold integers: what a converted model is made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.activation_fake_quant import INT8
from qaware.engines.base import ActivationRange, QuantizedWeight
from qaware.engines.weight_fake_quant import integer_dtype
from qaware.plan import Decision


class Float16Linear(nn.Linear):
    """A linear layer whose weight is stored in float16 and multiplied in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), dtype of ``input``."""
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class Float16Embedding(nn.Embedding):
    """An embedding whose table is stored in float16 and returned in the dtype that it was trained in."""

    dtype: torch.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        """int64 (...) to (..., embedding_dim)."""
        return super().forward(input).to(self.dtype)


class StaticLinear(nn.Linear):
    """A linear layer whose input is rounded to int8 with a calibrated range."""

    scale: float
    zero_point: int

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        rounded = torch.fake_quantize_per_tensor_affine(input.float(), self.scale, self.zero_point, *INT8)
        return F.linear(rounded.to(input.dtype), self.weight, self.bias)


def become_integer(
    module: Any, decision: Decision, weight: QuantizedWeight, activation: ActivationRange | None
) -> None:
    """Give a layer its integers and the class that computes with them, in place."""
    linear = decision.type == "Linear"
    if weight.scheme.is_float:
        module.__class__ = Float16Linear if linear else Float16Embedding
        if not linear:
            module.dtype = module.weight.dtype
        module.weight = nn.Parameter(weight.data, requires_grad=False)
    else:
        module.__class__ = nn.Linear if linear else nn.Embedding
        module.weight = nn.Parameter(
            _integer_tensor(decision, weight, module.weight.dtype), requires_grad=False
        )
    if linear and module.bias is not None:
        module.bias.requires_grad_(False)
    if activation is not None:
        module.__class__ = StaticLinear
        module.scale, module.zero_point = activation.scale, activation.zero_point


def _integer_tensor(decision: Decision, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    assert decision.scheme is not None
    assert weight.scale is not None
    zero_point = weight.zero_point
    dynamic = decision.scheme.activation == "int8-dynamic"
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        weight.data,
        weight.scale,
        torch.zeros_like(weight.scale, dtype=torch.int8) if zero_point is None else zero_point,
        integer_dtype(weight.scheme),
        (1, weight.scheme.block(weight.data.shape[1])),
        dtype,
        "int8_asym_per_token" if dynamic else None,
    )
    return tensor
