"""int8 and float16 weights in a tract graph: variables, and the operations that make float32 of them.

tract computes in float32 here, and turns constants into float32 once, while it loads, but only where
the result has at most 2**20 numbers; above that it would convert the whole weight in every call
(measured with 0.23.9: 87 ms rather than 9 ms for 2048 x 8192). So a linear layer is cut into parts of
that size by rows, and an embedding converts the rows that it has gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from nnef_tools.model import Graph, Operation
from nnef_tools.model import Tensor as Node

from qaware.engines.base import QuantizedWeight

Choice = Callable[[Node], Node]

FOLDED = 2**20
"""Numbers of a constant that tract still computes while it loads."""


def unpack(graph: Graph, variable: Operation, label: str, weight: QuantizedWeight) -> None:
    """Replace the float32 ``variable`` (rows, width) by stored numbers, for each of its readers."""
    whole = variable.output
    for reader in list(whole.consumers):
        linear = linear_of(reader, whole)
        if reader.type == "tract_core_gather" and reader.inputs[0] is whole and reader.attribs["axis"] == 0:
            _gather(_Stored(Steps.before(reader), label, weight), reader)
        elif linear is not None and weight.data.numel() > FOLDED:
            _split(_Stored(Steps.before(linear), label, weight), reader, linear)
        else:
            value = _Stored(Steps.before(reader), label, weight).float32(_all, shape=whole.shape[1:])
            reader.inputs = tuple(value if node is whole else node for node in reader.inputs)
    graph.remove_operation(variable, unlink=True)


def _all(node: Node) -> Node:
    return node


def linear_of(reader: Operation, whole: Node) -> Operation | None:
    """The linear layer that reads ``whole``, directly or with leading axes of size 1."""
    if reader.type == "unsqueeze" and len(reader.output.consumers) == 1:
        reader, whole = reader.output.consumers[0], reader.output
    return reader if reader.type == "linear" and reader.inputs[1] is whole else None


def _gather(stored: _Stored, reader: Operation) -> None:
    """Rows of integers first, float32 after."""
    steps, tokens, output = stored.steps, reader.inputs[1], reader.output

    def rows(node: Node) -> Node:
        chosen = steps.new((*tokens.shape, *node.shape[1:]), node.dtype)
        return steps.add("tract_core_gather", [node, tokens], chosen, axis=0)

    reader.outputs = ()
    stored.float32(rows, len(tokens.shape), output)
    steps.graph.remove_operation(reader, unlink=True)


def _split(stored: _Stored, reader: Operation, linear: Operation) -> None:
    """The layer as several, each of some of its rows, and their outputs side by side."""
    steps, output = stored.steps, linear.output
    source, _, bias = linear.inputs
    axes = reader.attribs["axes"] if reader is not linear else []
    zero = Node(steps.graph, "", (), np.float32, np.zeros((), np.float32))
    parts = []
    for first, last in stored.parts():
        value = stored.float32(partial(steps.slice, first=first, last=last))
        for axis in axes:
            value = steps.add("unsqueeze", [value], steps.new((1, *value.shape)), axes=[axis])
        part = steps.new((*output.shape[:-1], last - first))
        parts.append(steps.add("linear", [source, value, zero], part))
    linear.outputs = ()
    together = output if bias.producer is None else steps.new(output.shape)
    steps.add("concat", parts, together, axis=len(output.shape) - 1)
    if bias.producer is not None:
        steps.add("add", [together, bias], output)
    steps.graph.remove_operations({linear, reader}, unlink=True)


def fence(graph: Graph, node: Node) -> None:
    """Put a step behind ``node`` that gives back its value and that tract's optimizer moves nothing across.

    It moves slices in front of a gather, and weights of a linear layer into the parts of its input; where
    the weight is packed, both end the process (0.23.9).
    """
    readers, outputs = list(node.consumers), list(graph.outputs)
    steps = Steps(graph, list(graph.operations).index(node.producer) + 1)
    same = steps.add("le", [node, node], steps.new(node.shape, np.bool_))
    twice = steps.add("add", [node, node], steps.new(node.shape))
    # Not a number, the only value that is not equal to itself, is twice itself too.
    fenced = steps.add("select", [same, node, twice], steps.new(node.shape))
    for reader in readers:
        inputs = [fenced if n is node else n for n in reader.inputs]
        reader.inputs = inputs if reader.type in ("concat", "stack") else tuple(inputs)
    graph.outputs = [fenced if n is node else n for n in outputs]


class _Stored:
    """The variables of one weight for one reader. tract keeps a constant that has several readers as it
    is, so each reader gets its own; they share the file."""

    def __init__(self, steps: Steps, label: str, weight: QuantizedWeight) -> None:
        self.steps = steps
        self.rows, self.width = weight.data.shape
        blocks = 1 if weight.scale is None else weight.scale.shape[1]
        self.integers = steps.variable(label, weight.data.reshape(self.rows, blocks, -1))
        self.zero_point = self._per_block(f"{label}_zero_point", weight.zero_point)
        self.scale = self._per_block(f"{label}_scale", weight.scale)

    def parts(self) -> Iterable[tuple[int, int]]:
        """First row and row behind the last of parts that tract converts while it loads."""
        step = max(1, FOLDED // self.width)
        return [(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]

    def float32(
        self, choose: Choice, lead: int = 1, output: Node | None = None, shape: tuple[int, ...] = ()
    ) -> Node:
        """``(integers - zero_point) * scale`` of the rows that ``choose`` takes, (..., width).

        Args:
            choose: (rows, blocks, any) to (some, blocks, any), or to (tokens..., blocks, any).
            lead: number of axes in front of the blocks.
            output: receives the result.
            shape: of a row; (width,) where nothing is given.
        """
        value = self._cast(choose(self.integers))
        if self.zero_point is not None:
            inputs = [value, self._cast(choose(self.zero_point))]
            value = self.steps.add("sub", inputs, self.steps.new(value.shape))
        if self.scale is not None:
            inputs = [value, choose(self.scale)]
            value = self.steps.add("mul", inputs, self.steps.new(value.shape))
        row = shape or (self.width,)
        if output is None:
            output = self.steps.new((*value.shape[:lead], *row))
        return self.steps.add("reshape", [value], output, shape=list(row), axis_start=lead, axis_count=2)

    def _cast(self, node: Node) -> Node:
        return self.steps.add("tract_core_cast", [node], self.steps.new(node.shape), to="f32")

    def _per_block(self, label: str, data: torch.Tensor | None) -> Node | None:
        return None if data is None else self.steps.variable(label, data.unsqueeze(-1))


class Steps:
    """Adds operations in order, the first at position ``at``."""

    def __init__(self, graph: Graph, at: int) -> None:
        self.graph = graph
        self.at = at

    @classmethod
    def before(cls, op: Operation) -> Steps:
        """Directly in front of ``op``."""
        return cls(op.graph, list(op.graph.operations).index(op))

    def variable(self, label: str, data: torch.Tensor) -> Node:
        """A tensor of the archive."""
        array = data.numpy()
        node = self.new(tuple(array.shape), array.dtype.type)
        node.data = array
        return self.add("variable", None, node, label=label, shape=list(array.shape), dtype=node.dtype)

    def slice(self, node: Node, first: int, last: int) -> Node:
        """Rows ``first`` to ``last - 1``."""
        rows = self.new((last - first, *node.shape[1:]), node.dtype)
        return self.add("slice", [node], rows, axes=[0], begin=[first], end=[last], stride=[1])

    def add(self, kind: str, inputs: list[Node] | None, output: Node, **attribs: Any) -> Node:
        """One operation; returns ``output``."""
        # NNEF's concat takes a list; the others separate arguments.
        given = tuple(inputs) if inputs and kind != "concat" else inputs
        Operation(self.graph, type=kind, inputs=given, outputs=output, attribs=attribs)
        self.graph.move_operation(len(self.graph.operations) - 1, self.at)
        self.at += 1
        return output

    def new(self, shape: tuple[int, ...], dtype: type = np.float32) -> Node:
        """A value without producer yet."""
        return Node(self.graph, f"qaware_{len(self.graph.tensors)}", shape, dtype)
