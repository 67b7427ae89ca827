"""A second, empty channel for convolutions of one: onednn's int8 kernels compute something else without."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qaware.exporters.qdq import DEQUANTIZE, QUANTIZE

_ATEN: Any = torch.ops.aten
_CONVOLUTIONS = {
    _ATEN.conv1d.default: 1,
    _ATEN.conv1d.padding: 1,
    _ATEN.conv2d.default: 2,
    _ATEN.conv2d.padding: 2,
}
_GROUPS = 6


def widen_channels(module: GraphModule) -> None:
    """Pad input and weight of each integer convolution that has one input channel with a zero one, in place.

    Tried on torch 2.13 (x86-64, AVX512-VNNI): such a layer is off by 200 steps, silently, with any kernel
    size and padding; with the zeros, which add nothing to any sum, by none.
    """
    for node in list(module.graph.nodes):
        axes = _CONVOLUTIONS.get(node.target)
        if axes is not None and _is_rounded(node.args[0]) and _is_single(node):
            _widen(module, node, [0, 0] * axes + [0, 1])
    module.graph.eliminate_dead_code()
    module.recompile()


def _is_single(node: Any) -> bool:
    groups = node.args[_GROUPS] if len(node.args) > _GROUPS else 1
    return bool(groups == 1 and node.args[1].meta["val"].shape[1] == 1)


def _is_rounded(value: Any) -> bool:
    return value.target is DEQUANTIZE and value.args[0].target is QUANTIZE


def _widen(module: GraphModule, node: Node, pad: list[int]) -> None:
    read, values = node.args[0], node.args[1]
    assert isinstance(read, Node)
    assert isinstance(values, Node)
    rounded = read.args[0]
    assert isinstance(rounded, Node)
    graph = module.graph
    with graph.inserting_before(node):
        wide = graph.call_function(_ATEN.pad.default, (rounded.args[0], pad))
        integers = graph.call_function(QUANTIZE, (wide, *rounded.args[1:]))
        source = graph.call_function(DEQUANTIZE, (integers, *read.args[1:]))
        stored = graph.call_function(_ATEN.pad.default, (values.args[0], pad))
        weight = graph.call_function(values.target, (stored, *values.args[1:]))  # type: ignore[arg-type]
    node.args = (source, weight, *node.args[2:])
