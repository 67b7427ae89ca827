"""Layers that hold integers at their width and compute what the converted layers compute, with floats."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.activation_fake_quant import INT8
from qaware.engines.base import ActivationRange, QuantizedModel
from qaware.engines.static_integer import IntegerLayer
from qaware.errors import QawareError
from qaware.exporters.packed import PackedWeight, StoredWeight
from qaware.plan import Decision


def integers_per_token(x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """``x`` as int8 with an asymmetric range for each token (last axis), and the grid: block, scale, zero
    point (of each token), dtype and limits.

    These are the operators that torchao's linear runs. Its Python functions around them also switch
    gradients off, and torch.export cuts the graph at each switch: time quadratic in the layers.
    """
    ops: Any = torch.ops.torchao
    block = [1] * (x.dim() - 1) + [x.shape[-1]]
    scale, zero = ops.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, *INT8, None, None, torch.int8)
    grid = (block, scale, zero, torch.int8, *INT8)
    return ops.quantize_affine(x, *grid), grid


def round_per_token(x: Tensor) -> Tensor:
    """``x`` on an asymmetric int8 grid for each token (last axis), same shape and dtype."""
    integers, grid = integers_per_token(x)
    return cast(Tensor, torch.ops.torchao.dequantize_affine(integers, *grid, output_dtype=x.dtype))


def static_integers(x: Tensor, static: ActivationRange) -> Tensor:
    """``x`` as the integers of a calibrated range, float32 from -128 to 127."""
    # What torch.fake_quantize_per_tensor_affine computes; torch.export cannot trace that operator.
    return ((x.float() * (1 / static.scale)).round() + static.zero_point).clamp(*INT8)


class PackedLinear(nn.Linear):
    """A linear layer on a packed weight; its input is rounded as the converted layer rounds it."""

    packed: StoredWeight
    activation: str
    static: ActivationRange | None
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The converted layer's weight, unpacked at each use."""
        return self.packed.tensor(self.activation, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), dtype of ``input``."""
        return F.linear(self.round(input), self.packed.dequantize().to(self.dtype), self.bias)

    def round(self, input: Tensor) -> Tensor:
        """The input as integers can hold it, same shape and dtype; unchanged for weight-only schemes."""
        if self.activation == "int8-dynamic":
            return round_per_token(input)
        if self.static is None:
            return input
        integers = static_integers(input, self.static)
        return ((integers - self.static.zero_point) * self.static.scale).to(input.dtype)


class PackedEmbedding(nn.Embedding):
    """An embedding on a packed table; only the rows that are looked up are unpacked."""

    packed: StoredWeight
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The converted table, unpacked at each use; for heads that read it."""
        return self.packed.tensor("none", self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """int64 (...) to (..., embedding_dim)."""
        return self.packed.dequantize(input).to(self.dtype)


class PackedConvolution(nn.Module):
    """The part that convolutions on a packed weight share."""

    packed: StoredWeight
    bias: Any
    shape: torch.Size
    """Of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """As of the float layer, in float32 inside."""
        layer: Any = self
        weight = self.packed.dequantize().view(self.shape)
        y: Tensor = layer._conv_forward(input.float(), weight, self.bias)
        return y.to(input.dtype)


class PackedConv1d(PackedConvolution, nn.Conv1d):
    """(batch, in_channels, length) to (batch, out_channels, length)."""


class PackedConv2d(PackedConvolution, nn.Conv2d):
    """(batch, in_channels, height, width) to (batch, out_channels, height, width)."""


_CLASSES = {
    "Linear": PackedLinear,
    "Embedding": PackedEmbedding,
    "Conv1d": PackedConv1d,
    "Conv2d": PackedConv2d,
}


def pack_layers(quantized: QuantizedModel) -> None:
    """Turn the integer layers of ``quantized.module`` into packed ones, in place, ties kept; those whose
    activations are integers too, and those packed otherwise already, stay what they are, and so do those of
    the graph engine, whose graph reads the weights itself.

    Raises:
        QawareError: a scale does not fit its precision, or an embedding renormalizes its rows.
    """
    if in_graph(quantized):
        return
    modules: dict[str, Any] = dict(quantized.module.named_modules())
    shared: dict[int, PackedWeight | nn.Parameter] = {}
    for name, weight in quantized.weights.items():
        decision, key = quantized.plan.layer(name), weight.data.data_ptr()
        if _multiplies_integers(modules[name], decision):
            continue
        if isinstance(modules[name], tuple(_CLASSES.values())):
            continue
        if weight.scheme.is_float:
            # Float16 layers already store what they should; only the tie was lost when they were copied.
            modules[name].weight = shared.setdefault(key, nn.Parameter(weight.data, requires_grad=False))
            continue
        if key not in shared:
            shared[key] = PackedWeight(weight)
        become_packed(modules[name], decision, quantized.activations.get(name), _CLASSES[decision.type])
        modules[name].packed = shared[key]


def in_graph(quantized: QuantizedModel) -> bool:
    """Whether the graph engine made it."""
    return quantized.plan.layout is not None and quantized.plan.layout.engine == "graph"


def _multiplies_integers(module: nn.Module, decision: Decision) -> bool:
    assert decision.scheme is not None
    return isinstance(module, IntegerLayer) and decision.scheme.is_static


def become_packed(
    module: Any, decision: Decision, static: ActivationRange | None, kind: type[nn.Module]
) -> None:
    """By class, as the engine does: the object keeps its hooks and every place that holds it."""
    assert decision.scheme is not None
    if getattr(module, "max_norm", None) is not None:
        raise QawareError(f"{decision.module}: max_norm {module.max_norm} cannot be exported; use None")
    module.dtype, module.activation, module.static = module.weight.dtype, decision.scheme.activation, static
    module.shape = module.weight.shape
    del module.weight
    module.__class__ = kind
