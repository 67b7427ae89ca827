"""What of a lowered ExecuTorch program runs on a backend, by operator and by share of weights.

A partitioner leaves out, without a word, what it does not know; that part runs on portable kernels, which
are orders of magnitude slower for convolutions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qaware.exporters.executorch_rewrite import CONSTANT
from qaware.wording import counted

_WEIGHT = {"convolution": 1, "linear": 1, "mm": 1, "addmm": 2, "embedding": 0}
"""Which argument of an operator is its weight; its input is the one before, but for an embedding."""
_MOVES = ("permute_copy", "t_copy", "transpose_copy", "view_copy", "_to_copy", "expand_copy")
_CONVERSIONS = ("quantize", "dequantize", "choose_qparams")
_PLUMBING = ("getitem", "executorch_call_delegate", "sym_size", "alloc")


@dataclass(frozen=True)
class Delegation:
    """Counts of one program."""

    delegated: dict[str, int]
    """Operators that run on the backend, quantize and dequantize left out."""
    portable: dict[str, int]
    """Operators that run on portable kernels."""
    int8_layers: int
    """Convolutions and linear layers on the backend whose weights and inputs are integers."""
    layers: int
    """All convolutions, linear layers and embeddings."""
    int8_weights: int
    """Numbers in the weights of ``int8_layers``."""
    weights: int
    """Numbers in the weights of ``layers``."""

    def lines(self) -> tuple[str, ...]:
        """One line for the report."""
        share = self.int8_weights / max(self.weights, 1)
        left = ", ".join(f"{name} {count}" for name, count in self.portable.items()) or "nothing"
        return (
            f"XNNPACK runs {self.int8_layers} of {counted(self.layers, 'layer')} in int8, {share:.1%} of the "
            f"weights; not delegated: {left}",
        )


def delegation(program: Any) -> Delegation:
    """Look through an edge program that a partitioner has cut.

    Args:
        program: ``to_edge_transform_and_lower(...).exported_program()``.
    """
    parts = list(_delegates(program))
    delegated = [node for part in parts for node in _operators(part)]
    portable = list(_operators(program))
    inside = [(size, node) for part in parts for node, size in _weights(part)]
    outside = [size for _, size in _weights(program)]
    int8 = [size for size, node in inside if _is_int8(node)]
    return Delegation(
        delegated=_counts(n for n in delegated if not _name(n).startswith(_CONVERSIONS)),
        portable=_counts(portable),
        int8_layers=len(int8),
        layers=len(inside) + len(outside),
        int8_weights=sum(int8),
        weights=sum(size for size, _ in inside) + sum(outside),
    )


def _delegates(program: Any) -> Iterator[Any]:
    module = program.graph_module
    for node in module.graph.nodes:
        if node.op == "get_attr" and hasattr(lowered := getattr(module, node.target), "original_module"):
            yield lowered.original_module


def _operators(program: Any) -> Iterator[Node]:
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and _name(node) not in _PLUMBING:
            yield node


def _name(node: Node) -> str:
    """``convolution`` of ``aten.convolution.default``."""
    target: Any = node.target
    words = getattr(target, "__name__", str(target)).split(".")
    return str(words[-2] if len(words) > 1 else words[0])


def _counts(nodes: Iterable[Node]) -> dict[str, int]:
    return dict(Counter(_name(node) for node in nodes).most_common())


def _weights(program: Any) -> Iterator[tuple[Node, int]]:
    """Each layer with the numbers in its weight; a product of activations, or with our constants, is none."""
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    for node in _operators(program):
        weight = _behind(_weight(node))
        if not isinstance(weight, Node) or weight.op != "placeholder" or weight.name in inputs:
            continue
        if CONSTANT not in weight.name:
            yield node, weight.meta["val"].numel()


def _weight(node: Node) -> Any:
    position = _WEIGHT.get(_name(node))
    return None if position is None else node.args[position]


def _behind(node: Any, names: tuple[str, ...] = (*_MOVES, *_CONVERSIONS)) -> Any:
    """What ``node`` is made of, without the operators that are called ``names``."""
    while isinstance(node, Node) and node.op == "call_function" and _name(node).startswith(names):
        node = node.args[0]
    return node


def _is_int8(node: Node) -> bool:
    """Whether a layer's input and weight come from dequantize operators."""
    sources = (_behind(node.args[_WEIGHT[_name(node)] - 1], _MOVES), _behind(_weight(node), _MOVES))
    return all(isinstance(s, Node) and _name(s).startswith("dequantize") for s in sources)
