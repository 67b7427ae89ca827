"""Operators of an exported decoder in forms that XNNPACK takes, so that its partitions are not cut at them.

A cut costs more than the portable operator: each partition reads its inputs from memory and sets up anew in
every call. A Llama of six layers has 7 partitions instead of 33. Results are equal to float rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

CONSTANT = "qaware_constant"
"""What the names of matrices begin with that are no weights of the model."""
_ATEN: Any = torch.ops.aten
_RESHAPES = (
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
)


def rewritten(program: Any) -> Any:
    """A program of torch.export, decomposed to functional ATen operators, in the forms of this file.

    - Reshapes have -1 for their dynamic axis, which XNNPACK infers; it refuses a symbol.
    - What sums or moves numbers along the last axis is a product with a constant matrix: the mean of RMSNorm,
      which XNNPACK has for images only, and the slices of rotary embeddings, which it has for fixed sizes.
    - Aliases and pairs of transposes that undo each other are gone.
    """
    program = program.run_decompositions({})
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target in _RESHAPES:
            _infer(node)
        elif (source := _undone(node)) is not None:
            node.replace_all_uses_with(source)
        elif (found := _mean(node) or _halves(node)) is not None:
            _multiply(program, node, *found)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _infer(node: Node) -> None:
    shape = node.meta["val"].shape
    if sum(not isinstance(size, int) for size in shape) <= 1:
        node.target = _ATEN.view.default
        node.args = (node.args[0], [size if isinstance(size, int) else -1 for size in shape])


def _undone(node: Node) -> Any:
    """The node that ``node`` is equal to, or None."""
    source: Any = node.args[0] if node.args else None
    if node.target is _ATEN.alias.default:
        return source
    if node.target is _ATEN.transpose.int and source.target is _ATEN.transpose.int:
        return source.args[0] if set(node.args[1:]) == set(source.args[1:]) else None
    return None


def _mean(node: Node) -> tuple[Node, Tensor] | None:
    """Input and matrix (1, N) of a mean over the last axis that keeps it; None for another node."""
    arguments: Any = node.args
    if node.target is not _ATEN.mean.dim or len(arguments) < 3 or not arguments[2] or node.kwargs:
        return None
    width = _width(arguments[0])
    if width is None or not _is_last(arguments[0], *arguments[1]):
        return None
    return arguments[0], torch.full((1, width), 1 / width)


def _halves(node: Node) -> tuple[Node, Tensor] | None:
    """Input and matrix of ``cat([x, x], -1)`` and ``cat([-x[..., n:], x[..., :n]], -1)``, which rotary
    embeddings are made of; None for another node."""
    arguments: Any = node.args
    if node.target is not _ATEN.cat.default or len(arguments[0]) != 2 or not _is_last(node, *arguments[1:]):
        return None
    first, second = arguments[0]
    if first is second and (width := _width(first)) is not None:
        return first, torch.eye(width).repeat(2, 1)
    source = second.args[0] if second.target is _ATEN.slice.Tensor else None
    if source is None or (width := _width(source)) is None or first.target is not _ATEN.neg.default:
        return None
    half = width // 2
    if _cut(second, source) != (0, half) or _cut(first.args[0], source) != (half, width):
        return None
    return source, torch.eye(width).roll(-half, 0) * torch.tensor([[-1.0]] * (width - half) + [[1.0]] * half)


def _width(node: Any) -> int | None:
    """The size of the last axis of a float32 tensor, if it is fixed."""
    value = node.meta["val"]
    return value.shape[-1] if value.dtype == torch.float32 and isinstance(value.shape[-1], int) else None


def _is_last(node: Any, *axes: int) -> bool:
    return axes in ((-1,), (node.meta["val"].dim() - 1,))


def _cut(node: Any, source: Node) -> tuple[int, int] | None:
    """First and end of a slice of ``source`` along its last axis, in steps of 1."""
    if node.target is not _ATEN.slice.Tensor or node.args[0] is not source or len(node.args) != 4:
        return None
    _, axis, low, high = node.args
    return (low, min(high, source.meta["val"].shape[-1])) if _is_last(source, axis) else None


def _multiply(program: Any, node: Node, source: Node, matrix: Tensor) -> None:
    """Replace ``node`` by ``source`` times ``matrix`` (out, in)."""
    from executorch.backends.transforms.utils import create_constant_placeholder
    from torch.export.graph_signature import InputKind

    graph = node.graph
    # One for all layers: the name says what is in it.
    kind, (rows, width) = str(node.target).split(".")[1], matrix.shape
    name = f"{CONSTANT}_{kind}_{rows}_{width}"
    with graph.inserting_before(next(iter(graph.nodes))):
        constant = create_constant_placeholder(program, graph, name, InputKind.BUFFER, matrix, True)
    with graph.inserting_before(node):
        product = graph.call_function(_ATEN.linear.default, (source, constant))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
