"""Rounding to integers in a tract graph: what changes no value is removed, what is left is spelled out.

tract 0.23.9 takes 13 to 27 nanoseconds to cast one float32 to an integer of a grid (AMD EPYC), more than it
takes to compute it; five float operations, which it runs in one pass, do the same in 1.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nnef_tools.model import Graph, Operation
from nnef_tools.model import Tensor as Node

from qaware.exporters.tract_unpack import Steps

CAST = "tract_core_cast"
_LISTS = ("concat", "stack", "tract_core_einsum_q")
"""Operations that take one list of values, which nnef_tools tells from several arguments by its type."""
_ROUNDS = 1.5 * 2.0**23
"""Behind this number float32 has no fractions: adding it rounds to the nearest integer, ties to even."""


def drop_round_trips(graph: Graph) -> None:
    """Remove what changes no value: integers cast to float32 and back to their own grid, and a ReLU on a grid
    that starts at zero."""
    for relu in [op for op in graph.operations if op.type == "relu"]:
        source = relu.inputs[0]
        if (integers := _integers_of(source)) is not None and integers.quant["zero_point"] == 0:
            _replace(graph, relu, source)
    for cast in [op for op in graph.operations if op.type == CAST and op.output.quant]:
        integers = _integers_of(cast.inputs[0])
        if integers is not None and integers.quant == cast.output.quant:
            _replace(graph, cast, integers)


def fence_concatenations(graph: Graph) -> None:
    """Keep casts in front of a concatenation where they are. tract 0.23.9 moves it in front of them and,
    where integers have another reader too, loses all inputs but one."""
    for concat in [op for op in graph.operations if op.type == "concat"]:
        steps = Steps.before(concat)
        concat.inputs = [
            node if _integers_of(node) is None else _fenced(steps, node) for node in concat.inputs
        ]


def _fenced(steps: Steps, node: Node) -> Node:
    """The same value, by an operation that tract does not see through."""
    lowest = Node(steps.graph, "", (), np.float32, np.asarray(np.finfo(np.float32).min))
    return steps.add("max", [node, lowest], steps.new(node.shape))


def _integers_of(node: Node) -> Node | None:
    """What a float32 value was cast from, when that is on a grid."""
    producer = node.producer
    if producer is None or producer.type != CAST or not producer.inputs[0].quant:
        return None
    integers: Node = producer.inputs[0]
    return integers


def _replace(graph: Graph, op: Operation, value: Node) -> None:
    """Let the readers of ``op`` read ``value``; an output of the graph keeps its name and its operation."""
    result = op.output
    if result in graph.outputs:
        return
    for reader in list(result.consumers):
        inputs = [value if node is result else node for node in reader.inputs]
        reader.inputs = inputs if reader.type in _LISTS else tuple(inputs)
    graph.remove_operation(op, unlink=True)


def spell_out_round_trips(graph: Graph) -> None:
    """Replace integers that are only cast back to float32 by float32 values on their grid."""
    for cast in [op for op in graph.operations if op.type == CAST and op.output.quant]:
        integers = cast.output
        back = list(integers.consumers)
        if integers in graph.outputs or any(op.type != CAST or op.output.quant for op in back):
            continue
        for op in back:
            if op.output.consumers or op.output in graph.outputs:
                _round(Steps.before(op), cast.inputs[0], integers.quant, op)
            graph.remove_operation(op, unlink=True)
        graph.remove_operation(cast, unlink=True)


def _round(steps: Steps, value: Node, grid: dict[str, Any], back: Operation) -> None:
    """``value`` on ``grid`` as float32, in place of the output of ``back``."""
    zero, scale, output = float(grid["zero_point"]), float(grid["scale"]), back.output
    back.outputs = ()
    if zero == 0 and value.producer is not None and value.producer.type == "relu":
        # The grid starts where a ReLU does.
        value = value.producer.inputs[0]
    # The zero point after rounding, as torch does: an odd one would change what halves become.
    chain = [("mul", 1 / scale), ("add", _ROUNDS), ("sub", _ROUNDS - zero), ("max", 0.0), ("min", 255.0)]
    for kind, number in [*chain, ("sub", zero)]:
        value = steps.add(kind, [value, _constant(steps, number)], steps.new(value.shape))
    steps.add("mul", [value, _constant(steps, scale)], output)


def _constant(steps: Steps, number: float) -> Node:
    return Node(steps.graph, "", (), np.float32, np.asarray(number, np.float32))
