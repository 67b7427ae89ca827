"""Quantize and dequantize operators in an exported program, as compilers turn them into int8 kernels.

XNNPACK and Inductor know a quantized operator as a float one between ``quantized_decomposed`` operators.
Integer layers trace to that form with :class:`DecomposedArithmetic`; a graph that torchao's PT2E converted
has it already. None of the rewrites here changes a value; each says why.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from qaware.engines.base import ActivationRange
from qaware.engines.static_integer import INT8, Arithmetic, IntegerLayer, Requantize

_OPS: Any = torch.ops.quantized_decomposed
_ATEN: Any = torch.ops.aten
QUANTIZE, DEQUANTIZE = _OPS.quantize_per_tensor.default, _OPS.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = _OPS.dequantize_per_channel.default
_RELU = (_ATEN.relu.default, _ATEN.relu_.default)
_CEILINGS = (_ATEN.hardtanh.default, _ATEN.hardtanh_.default, _ATEN.clamp.default)
_ROUNDING = 1 + 1e-6
"""The top of a grid is a product of floats."""
_CAT = (_ATEN.cat.default, _ATEN.concat.default)
_CONV1D = (_ATEN.conv1d.default, _ATEN.conv1d.padding)
_LAYERS = (_ATEN.linear.default, *_CONV1D, _ATEN.conv2d.default, _ATEN.conv2d.padding)
_PADS = (_ATEN.pad.default, _ATEN.constant_pad_nd.default)
_MOVES = (
    *(_ATEN.max_pool1d.default, _ATEN.max_pool2d.default, _ATEN.view.default, _ATEN.reshape.default),
    *(_ATEN.flatten.using_ints, _ATEN.permute.default, _ATEN.transpose.int, *_PADS),
)
"""Operators of which every result is one of their inputs, or the zero of a padding, which all grids have."""


class DecomposedArithmetic(Arithmetic):
    """The same values as of :class:`Arithmetic`, computed by ``quantized_decomposed`` operators."""

    def round_trip(self, x: Tensor, grid: ActivationRange) -> Tensor:
        """``x`` (any shape, float32) on the int8 grid, as float32 values."""
        limits = (grid.scale, grid.zero_point, *INT8, torch.int8)
        rounded: Tensor = DEQUANTIZE(QUANTIZE(x, *limits), *limits)
        return rounded

    def weight(self, layer: IntegerLayer) -> Tensor:
        """float32 in the layer's own shape."""
        channels = (layer.weight_scale, layer.weight_zero_point, 0, *INT8, torch.int8)
        values: Tensor = DEQUANTIZE_CHANNELS(layer.weight, *channels)
        return values


def decompose(module: nn.Module) -> bool:
    """Give the integer layers in ``module`` operators that compilers recognize, in place.

    One scale for a whole weight is repeated for each channel, the only form that Inductor knows. It is done
    here because compilers want constants next to the operators that read them.

    Returns:
        Whether there is any such layer.
    """
    found = [part for part in module.modules() if isinstance(part, (IntegerLayer, Requantize))]
    for part in found:
        part.arithmetic = DecomposedArithmetic()
        if isinstance(part, IntegerLayer):
            rows = part.weight.shape[0]
            part.weight_scale = part.weight_scale.expand(rows, 1).flatten().contiguous()
            part.weight_zero_point = part.weight_zero_point.expand(rows, 1).flatten().contiguous()
            if isinstance(getattr(part, "padding", None), str):
                _pad_apart(part)
    return bool(found)


def _pad_apart(layer: Any) -> None:
    """Numbers for ``same`` and ``valid``, or an operator where both ends differ; kernels refuse the words."""
    same = layer.padding == "same"
    whole = [same * d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding_mode == "zeros" and all(w % 2 == 0 for w in whole):
        layer.padding = tuple(w // 2 for w in whole)
    elif layer.padding_mode == "zeros":
        layer.padding_mode = "constant"


def clean(module: GraphModule, dtype: torch.dtype, whole: bool) -> bool:
    """Leave one pair of operators at each grid, in place.

    Args:
        module: of an exported program.
        dtype: of the integers of activations, ``torch.int8`` or ``torch.uint8``.
        whole: whether everything between integer operators is to be on integers too, as XNNPACK wants it.

    Returns:
        Whether there is any grid.
    """
    graph = module.graph
    if all(node.target is not QUANTIZE for node in _nodes(graph)):
        return False
    for node in _nodes(graph):
        _drop_cast(graph, node)
        _set_dtype(node, dtype)
    _drop_round_trips(graph)
    for node in _nodes(graph):
        if _clips_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in _nodes(graph):
        if whole or node.target in _PADS:
            _round_moved(graph, node)
        if whole:
            _round_parts(graph, node)
    _drop_round_trips(graph)
    module.recompile()
    return True


def integer_layers(graph: Graph) -> int:
    """How many convolutions and linear layers multiply integers with integers."""
    layers = [node for node in _nodes(graph) if node.target in _LAYERS]
    return sum(_grid(node.args[0]) is not None and _is_integer_weight(node.args[1]) for node in layers)


def float_conv1d(graph: Graph) -> bool:
    """Whether a convolution of one axis multiplies floats."""
    return any(node.target in _CONV1D and not _is_integer_weight(node.args[1]) for node in _nodes(graph))


def straighten(module: GraphModule) -> None:
    """Make what enters a linear layer contiguous, in place. With more than two axes torch computes others as
    a batched product, which Inductor's patterns take for dynamic axes with an error."""
    for node in _nodes(module.graph):
        if node.target is _ATEN.linear.default and node.meta["val"].dim() > 2:
            # In front of a pair of operators, which are to stay next to the layer.
            reader = node.args[0].args[0] if _grid(node.args[0]) else node
            source = reader.args[0]
            with module.graph.inserting_before(reader):
                straight = module.graph.call_function(_ATEN.contiguous.default, (source,))
            straight.meta.update(source.meta)
            reader.replace_input_with(source, straight)
    module.recompile()


def _is_integer_weight(node: Any) -> bool:
    return isinstance(node, Node) and node.target in (DEQUANTIZE_CHANNELS, DEQUANTIZE)


def _nodes(graph: Graph) -> list[Any]:
    return list(graph.nodes)


def _drop_cast(graph: Graph, node: Any) -> None:
    """Casts of float32 to float32 stand between operators that are to be recognized together."""
    source: Any = node.args[0] if node.args else None
    if node.target is _ATEN._assert_tensor_metadata.default:
        graph.erase_node(node)
    elif node.target is _ATEN.to.dtype and source.meta["val"].dtype is node.args[1]:
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _set_dtype(node: Any, dtype: torch.dtype) -> None:
    """The same grid with integers that begin at -128 or at 0."""
    activation = node.target is QUANTIZE or (
        node.target is DEQUANTIZE and isinstance(node.args[0], Node) and node.args[0].target is QUANTIZE
    )
    if activation and node.args[5] is not dtype:
        x, scale, zero, low, high = node.args[:5]
        shift = 128 if dtype is torch.uint8 else -128
        node.args = (x, scale, zero + shift, low + shift, high + shift, dtype)


def _grid(node: Any) -> tuple[Any, ...] | None:
    """Scale, zero point, limits and dtype of an activation on a grid."""
    if not isinstance(node, Node) or node.target is not DEQUANTIZE:
        return None
    integers = node.args[0]
    quantized = isinstance(integers, Node) and integers.target is QUANTIZE
    return tuple(node.args[1:]) if quantized else None


def _drop_round_trips(graph: Graph) -> None:
    """What is on a grid is not changed by rounding to it."""
    for node in _nodes(graph):
        if node.target is QUANTIZE and _grid(node.args[0]) == tuple(node.args[1:]):
            node.replace_all_uses_with(node.args[0].args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _clips_nothing(node: Any) -> bool:
    """Whether ``node`` is a ReLU, or one with a ceiling, of a grid that ends where it does."""
    if node.target not in (*_RELU, *_CEILINGS) or (grid := _grid(node.args[0])) is None:
        return False
    scale, zero_point, lowest, highest = grid[:4]
    if node.target in _RELU:
        return bool(zero_point == lowest)
    if len(node.args) != 3 or None in node.args[1:]:
        return False
    top = (highest - zero_point) * scale
    return bool(zero_point == lowest and node.args[1] == 0 and top <= node.args[2] * _ROUNDING)


def _fills(node: Any) -> bool:
    """Whether ``node`` pads with something that may be on no grid."""
    if node.target not in _PADS:
        return False
    place = 2 if node.target is _ATEN.constant_pad_nd.default else 3
    mode = node.args[2] if place == 3 and len(node.args) > 2 else "constant"
    value = node.args[place] if len(node.args) > place else node.kwargs.get("value")
    return bool(mode == "constant" and value)


def _round_moved(graph: Graph, node: Any) -> None:
    """What only moves values gives values on its input's grid."""
    if node.target in _MOVES and not _fills(node) and (grid := _grid(node.args[0])):
        _round_behind(graph, node, grid)


def _round_parts(graph: Graph, node: Any) -> None:
    """XNNPACK concatenates integers as they are, so the parts of a rounded result must have its grid:
    rounding each part is the same as rounding the whole."""
    users = list(node.users)
    if node.target in _CAT and len(users) == 1 and users[0].target is QUANTIZE:
        grid = tuple(users[0].args[1:])
        parts = [_round_before(graph, node, part, grid) for part in node.args[0]]
        node.args = (parts, *node.args[1:])


def _round_behind(graph: Graph, node: Any, grid: tuple[Any, ...]) -> None:
    readers = list(node.users)
    with graph.inserting_after(node):
        integers = graph.call_function(QUANTIZE, (node, *grid))
    with graph.inserting_after(integers):
        values = graph.call_function(DEQUANTIZE, (integers, *grid))
    for made in (integers, values):
        made.meta.update(node.meta)
    for reader in readers:
        reader.replace_input_with(node, values)


def _round_before(graph: Graph, reader: Node, node: Any, grid: tuple[Any, ...]) -> Any:
    if _grid(node) == grid:
        return node
    with graph.inserting_before(reader):
        integers = graph.call_function(QUANTIZE, (node, *grid))
        return graph.call_function(DEQUANTIZE, (integers, *grid))
