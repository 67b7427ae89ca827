"""Integer layers as tract's own quantized operators, for torch_to_nnef.

torch_to_nnef knows PyTorch's quantized modules, but no scale for each channel, no residual addition and no
concatenation on integers. tract's core has the operators: ``qconv`` and ``einsum_q`` take a vector of weight
scales (read in tract 0.23, ``nnef/src/ops/core/{qconv,qmatmul}.rs``, and tried). Values between layers are
float32, between a cast from integers and one to integers; pairs on one grid are removed again.

Imported only while a file is written, because torch_to_nnef keeps one list of extractors for the process.
"""

from __future__ import annotations

from typing import Any

import nnef
import numpy as np
import torch
from nnef_tools.model import Graph, Operation
from nnef_tools.model import Tensor as Node
from torch import Tensor, nn
from torch_to_nnef.op.custom_extractors.base import ModuleInfoExtractor
from torch_to_nnef.op.helper import add_nnef_operation, get_or_add_tensor_variable_in_nnef

from qaware.engines.base import ActivationRange
from qaware.engines.static_integer import (
    IntegerConv1d,
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    Requantize,
)
from qaware.exporters.tract_rounding import CAST
from qaware.exporters.tract_unpack import FOLDED

_SHIFT = 128
"""tract's activations are uint8; the same grid counted from 0."""
_AXES = "abcdefg"
RESCALED = (
    "their channels have scales of their own, which tract 0.23.9 applies to one product after the other, so "
    "that integers take 2 times as long as floats"
)
"""Why convolutions are multiplied as floats, though tract could multiply integers."""


def float_reason(layer: IntegerLayer, convolutions: str) -> str | None:
    """Why a layer's integers are multiplied as floats; None when they are multiplied as integers.

    Args:
        layer: with static activations.
        convolutions: ``integer`` or ``float``, those that tract is slower to multiply as integers.
    """
    if layer.input_grid is None or layer.output_grid is None:
        return "its input or output is float"
    if layer.weight_scale.shape[1] != 1:
        return "its weight has groups"
    if not bool((layer.weight_zero_point == layer.weight_zero_point.flatten()[0]).all()):
        return "its channels have different zero points"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"its padding_mode is {layer.padding_mode!r}"
    return RESCALED if convolutions == "float" and _is_rescaled(layer) else None


def _is_rescaled(layer: IntegerLayer) -> bool:
    """Whether it is a convolution of which each channel has another scale; larger weights would be converted
    to float32 in each call."""
    scale = layer.weight_scale.flatten()
    differ = bool((scale != scale[0]).any())
    return not isinstance(layer, IntegerLinear) and differ and layer.weight.numel() <= FOLDED


class _Floating(nn.Module):
    """A layer that rounds where an integer layer does and multiplies floats."""

    def forward(self, x: Tensor) -> Tensor:
        """As of the integer layer."""
        layer: Any = self
        y = layer.product(layer.before(x), layer.weight)
        return layer.after(torch.relu(y) if layer.relu else y)  # type: ignore[no-any-return]


class _FloatingLinear(_Floating, IntegerLinear):
    pass


class _FloatingConv1d(_Floating, IntegerConv1d):
    pass


class _FloatingConv2d(_Floating, IntegerConv2d):
    pass


_FLOATING = {
    IntegerLinear: _FloatingLinear,
    IntegerConv1d: _FloatingConv1d,
    IntegerConv2d: _FloatingConv2d,
}


def multiply_floats(layer: Any) -> None:
    """Make an integer layer one that only rounds, in place; its weight is the caller's business."""
    layer.before = nn.Identity() if layer.input_grid is None else Requantize(layer.input_grid)
    layer.after = nn.Identity() if layer.output_grid is None else Requantize(layer.output_grid)
    layer.__class__ = _FLOATING[type(layer)]


class _Emitter:
    """Writes one layer's operators into a graph."""

    def __init__(self, graph: Graph, node: Any, names: dict[str, Node]) -> None:
        self.graph, self.node, self.names = graph, node, names
        self.name = node.outputs[0].export_name
        self.shape = tuple(node.outputs[0].shape)

    def input(self, grid: ActivationRange) -> Node:
        """The layer's input on ``grid``."""
        source = get_or_add_tensor_variable_in_nnef(self.graph, self.node.inputs[0], self.names)
        integers = self.integers(f"{self.name}_input", source.shape, grid)
        Operation(self.graph, type=CAST, inputs=source, outputs=integers)
        return integers

    def integers(self, name: str, shape: Any, grid: ActivationRange) -> Node:
        """A value on ``grid``, without producer yet."""
        return Node(self.graph, name, dtype=np.uint8, shape=tuple(shape), quant=_quant(grid))

    def output(self, integers: Node) -> list[str]:
        """The layer's output as float32; returns the extensions that the graph needs."""
        values = Node(self.graph, self.name, dtype=np.float32, shape=self.shape)
        self.names[self.name] = values
        Operation(self.graph, type=CAST, inputs=integers, outputs=values, attribs={"to": "f32"})
        return ["tract_core"]

    def constant(self, suffix: str, data: np.ndarray[Any, Any]) -> Node:
        """A tensor of the archive, int32 or float32."""
        dtype = data.dtype.type
        node = Node(self.graph, f"{self.name}_{suffix}", data=data, dtype=dtype, shape=data.shape)
        attribs = {"label": node.name, "shape": list(data.shape), "dtype": dtype}
        add_nnef_operation(graph=self.graph, type="variable", inputs=None, outputs=node, attribs=attribs)
        return node

    def weight(self, layer: IntegerLayer) -> Node:
        """The integers, whose scale is the operator's business."""
        unit: dict[str, Any] = {"scale": 1.0, "zero_point": 0, "bits": 8, "signed": True, "symmetric": False}
        unit["op-name"] = "zero_point_linear_quantize"
        name, data = f"{self.name}_weight", layer.weight.detach().contiguous().numpy()
        node = Node(self.graph, name, dtype=np.int8, shape=data.shape, data=data, quant=unit)
        attribs = {"label": name, "shape": list(data.shape), "dtype": np.float32}
        Operation(
            self.graph, type="variable", name=f"{name}_variable", inputs=None, outputs=node, attribs=attribs
        )
        return node

    def scales(self, layer: IntegerLayer) -> Any:
        """Of the weight: a number, or a vector in the archive where channels differ."""
        scale = layer.weight_scale.flatten().float()
        if bool((scale == scale[0]).all()):
            return float(scale[0])
        return nnef.Identifier(self.constant("scale", scale.numpy()).name)

    def bias(self, layer: IntegerLayer) -> Node:
        """int32 (rows,), in units of the product."""
        assert layer.input_grid is not None
        unit = layer.weight_scale.flatten().double() * layer.input_grid.scale
        bias = torch.zeros_like(unit) if layer.bias is None else layer.bias.double()
        return self.constant("bias", (bias / unit).round().to(torch.int32).numpy())

    def parameters(self, layer: IntegerLayer) -> dict[str, Any]:
        """Zero points and scales: a of the weight, b of the input, c of the output."""
        source, result = layer.input_grid, layer.output_grid
        assert source is not None
        assert result is not None
        return {
            "a0": int(layer.weight_zero_point.flatten()[0]),
            "a_scale": self.scales(layer),
            "b0": source.zero_point + _SHIFT,
            "b_scale": source.scale,
            "c0": result.zero_point + _SHIFT,
            "c_scale": result.scale,
        }


class _RequantizeExtractor(ModuleInfoExtractor):  # type: ignore[misc]
    MODULE_CLASS = Requantize

    def convert_to_nnef(self, g: Graph, node: Any, name_to_tensor: Any, **_: Any) -> list[str]:
        emitter = _Emitter(g, node, name_to_tensor)
        return emitter.output(emitter.input(node.op_ref.grid))


class _LinearExtractor(ModuleInfoExtractor):  # type: ignore[misc]
    MODULE_CLASS = IntegerLinear

    def convert_to_nnef(self, g: Graph, node: Any, name_to_tensor: Any, **_: Any) -> list[str]:
        layer, emitter = node.op_ref, _Emitter(g, node, name_to_tensor)
        inputs = [emitter.weight(layer), emitter.input(layer.input_grid)]
        bias = emitter.bias(layer)
        result = emitter.integers(f"{emitter.name}_integers", emitter.shape, layer.output_grid)
        lead = _AXES[: len(emitter.shape) - 1]
        grid = layer.output_grid
        parameters = emitter.parameters(layer)
        channels = "" if isinstance(parameters["a_scale"], float) else "n"
        attribs = {
            # Weight, input, bias, then zero point and scale of each: the weight's may differ by channel.
            "expr": f"nk,{lead}k,n,,{channels},,,,->{lead}n",
            "acc": "i32",
            "output": f"QU8(Z:{grid.zero_point + _SHIFT} S:{grid.scale})",
            "bias": nnef.Identifier(bias.name),
            **parameters,
        }
        Operation(g, type="tract_core_einsum_q", inputs=inputs, outputs=result, attribs=attribs)
        return emitter.output(result)


class _ConvExtractor(ModuleInfoExtractor):  # type: ignore[misc]
    def convert_to_nnef(self, g: Graph, node: Any, name_to_tensor: Any, **_: Any) -> list[str]:
        layer, emitter = node.op_ref, _Emitter(g, node, name_to_tensor)
        inputs = (emitter.input(layer.input_grid), emitter.weight(layer), emitter.bias(layer))
        result = emitter.integers(f"{emitter.name}_integers", emitter.shape, layer.output_grid)
        attribs = {
            "groups": layer.groups,
            "dilation": list(layer.dilation),
            "stride": list(layer.stride),
            "padding": _padding(layer),
            "border": "constant",
            **emitter.parameters(layer),
        }
        Operation(g, type="tract_core_qconv", inputs=inputs, outputs=result, attribs=attribs)
        return emitter.output(result)


class _Conv1dExtractor(_ConvExtractor):
    MODULE_CLASS = IntegerConv1d


class _Conv2dExtractor(_ConvExtractor):
    MODULE_CLASS = IntegerConv2d


def _padding(layer: Any) -> list[tuple[int, int]]:
    """In front of and behind each axis."""
    if not isinstance(layer.padding, str):
        return [(p, p) for p in layer.padding]
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [(w // 2, w - w // 2) for w in whole]


def _quant(grid: ActivationRange) -> dict[str, Any]:
    return {
        "zero_point": grid.zero_point + _SHIFT,
        "scale": grid.scale,
        "bits": 8,
        "signed": False,
        "symmetric": False,
        "op-name": "zero_point_linear_quantize",
    }
