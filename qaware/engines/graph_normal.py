"""Give an exported graph the form that the runtimes' quantizers look for; it computes the same."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

_ATEN = torch.ops.aten
_PADDED: dict[Any, Any] = {
    _ATEN.conv1d.padding: _ATEN.conv1d.default,
    _ATEN.conv2d.padding: _ATEN.conv2d.default,
}
_LAYERS = (_ATEN.linear.default, *_PADDED, *_PADDED.values())
_SOURCES: dict[Any, Any] = {
    _ATEN.conv2d.default: nn.Conv2d,
    _ATEN.linear.default: nn.Linear,
    **dict.fromkeys((_ATEN.relu.default, _ATEN.relu_.default), nn.ReLU),
    **dict.fromkeys((_ATEN.hardtanh.default, _ATEN.hardtanh_.default), nn.Hardtanh),
    **dict.fromkeys((_ATEN.relu6.default, _ATEN.relu6_.default), nn.ReLU6),
    **dict.fromkeys((_ATEN.silu.default, _ATEN.silu_.default), nn.SiLU),
    **dict.fromkeys((_ATEN.hardswish.default, _ATEN.hardswish_.default), nn.Hardswish),
    **dict.fromkeys((_ATEN.add.Tensor, _ATEN.add_.Tensor), operator.add),
}
"""The module that stands for an operator in Inductor's patterns."""


def is_product(node: Any) -> bool:
    """Whether ``node`` is a linear layer or a convolution."""
    return isinstance(node, Node) and node.target in _LAYERS


def normalize(module: GraphModule) -> None:
    """In place: padding in numbers, a node of its own for each use of a weight, and the kind of module that
    each operator stands for."""
    for node in list(module.graph.nodes):
        if node.target in _PADDED:
            _pad_in_numbers(node)
        if is_product(node):
            _own_tensors(module, node)
        # Without it Inductor's patterns go by the module that was called, and one ReLU that is called twice
        # is two of them.
        if node.target in _SOURCES or node.target in _PADDED:
            node.meta["source_fn_stack"] = [(node.name, _SOURCES.get(node.target))]


def _pad_in_numbers(node: Node) -> None:
    """``same`` and ``valid``, unless the two sides differ."""
    complete(node)
    arguments: Any = node.args
    x, weight, bias, stride, padding, dilation, groups = arguments
    sizes = weight.meta["val"].shape[2:]
    steps = list(dilation) * (len(sizes) if len(dilation) == 1 else 1)
    total = [step * (size - 1) if padding == "same" else 0 for step, size in zip(steps, sizes, strict=True)]
    if all(pad % 2 == 0 for pad in total):
        node.target = _PADDED[node.target]
        node.args = (x, weight, bias, stride, [pad // 2 for pad in total], dilation, groups)


def _own_tensors(module: GraphModule, node: Node) -> None:
    """A quantizer passes over a layer whose weight it has seen at another call."""
    for position, tensor in enumerate(node.args[1:3], 1):
        if isinstance(tensor, Node) and tensor.op == "get_attr" and len(tensor.users) > 1:
            with module.graph.inserting_before(node):
                own = module.graph.node_copy(tensor)
            node.update_arg(position, own)


def complete(node: Node) -> None:
    """Write out the positional arguments that are left to their defaults."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        left = [
            a for a in schema.arguments[len(node.args) :] if not a.kwarg_only and a.name not in node.kwargs
        ]
        node.args = (*node.args, *(argument.default_value for argument in left))
