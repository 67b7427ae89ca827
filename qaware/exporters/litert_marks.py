"""Weights as marks, which a converter may move but not change, so that each is found again in its file.

A converter transposes and merges what it likes, and two weights may hold the same numbers. So a layer's
weight is replaced by numbers that no other weight has: element ``i`` of the layer that begins at ``first`` is
the float32 whose bits are ``first + i``. Whatever constant of the file holds them, they say which weight it
is and in which order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.static_integer import IntegerLayer
from qaware.errors import QawareError
from qaware.exporters.packed_layers import in_graph
from qaware.exporters.qdq import DEQUANTIZE, DEQUANTIZE_CHANNELS, DecomposedArithmetic, decompose
from qaware.plan import Decision

_SMALLEST, _LARGEST = 0x00800000, 0x7F7FFFFF
"""Bits of the positive normal float32 numbers."""


@dataclass(frozen=True)
class Mark:
    """The layer behind a range of numbers."""

    decision: Decision
    weight: QuantizedWeight
    first: int
    """Bits of its first number."""

    @property
    def count(self) -> int:
        """How many numbers."""
        return self.weight.data.numel()

    def tensor(self, shape: torch.Size) -> Tensor:
        """float32 of ``shape``."""
        bits = torch.arange(self.first, self.first + self.count, dtype=torch.int32)
        return bits.view(torch.float32).view(shape)


class _Marked(nn.Module):
    """The part that all layers share."""

    marked: Tensor
    beside: Tensor
    grid: ActivationRange | None

    @property
    def weight(self) -> Tensor:
        """The marks, which nothing is multiplied into: neither what multiplies the input nor the output."""
        from litert_torch.backend.optimization_barrier import optimization_barrier

        weight: Tensor = optimization_barrier(self.marked, self.beside)[0]  # it wants more than one
        return weight


class _MarkedLinear(_Marked, nn.Linear):  # type: ignore[override]
    """A linear layer whose input is rounded to int8 where a range was calibrated."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), float32."""
        x = input if self.grid is None else DecomposedArithmetic().round_trip(input, self.grid)
        return F.linear(x, self.weight, self.bias)


class _MarkedEmbedding(_Marked, nn.Embedding):  # type: ignore[override]
    """An embedding."""


class _MarkedConv1d(_Marked, nn.Conv1d):  # type: ignore[override]
    """(batch, in_channels, length) to (batch, out_channels, length)."""


class _MarkedConv2d(_Marked, nn.Conv2d):  # type: ignore[override]
    """(batch, in_channels, height, width) to (batch, out_channels, height, width)."""


class _MarkedArithmetic(DecomposedArithmetic):
    """That of an integer layer, on a float weight."""

    def weight(self, layer: IntegerLayer) -> Tensor:
        """The marks, in the layer's own shape."""
        marked: Any = layer.marked
        return cast(Tensor, marked)


_CLASSES: dict[str, type[nn.Module]] = {
    "Linear": _MarkedLinear,
    "Embedding": _MarkedEmbedding,
    "Conv1d": _MarkedConv1d,
    "Conv2d": _MarkedConv2d,
}


def use_marks(quantized: QuantizedModel) -> list[Mark]:
    """Turn the layers of ``quantized.module`` into float ones with marks as weights, in place; activations
    that have a calibrated range are rounded by operators.

    Raises:
        QawareError: an embedding renormalizes its rows, or there are more weights than numbers.
    """
    decompose(quantized.module)
    marks: list[Mark] = []
    first = _SMALLEST
    for name, weight in quantized.weights.items():
        mark = Mark(quantized.plan.layer(name), weight, first)
        first += mark.count
        if first > _LARGEST:
            raise QawareError(f"litert: {first - _SMALLEST:,} weights are more than one file is made of")
        marks.append(mark)
        if in_graph(quantized):
            continue
        module: Any = quantized.module.get_submodule(name)
        if isinstance(module, IntegerLayer) and weight_is_static(mark):
            module.register_buffer("marked", mark.tensor(module.weight.shape))
            module.arithmetic = _MarkedArithmetic()
        else:
            _become_float(module, mark, quantized.activations.get(name))
    return marks


def weight_is_static(mark: Mark) -> bool:
    """Whether the layer's activations are integers with a calibrated range."""
    return mark.decision.scheme is not None and mark.decision.scheme.is_static


def _become_float(module: Any, mark: Mark, grid: ActivationRange | None) -> None:
    """By class, as the engine does: the object keeps its hooks and every place that holds it."""
    if getattr(module, "max_norm", None) is not None:
        raise QawareError(f"{mark.decision.module}: max_norm {module.max_norm} cannot be exported; use None")
    shape = module.weight.shape
    del module.weight
    module.__class__ = _CLASSES[mark.decision.type]
    module.register_buffer("marked", mark.tensor(shape))
    module.register_buffer("beside", torch.zeros(1))
    module.grid = grid


def mark_graph(module: Any, marks: list[Mark]) -> None:
    """Put marks in the place of the integer weights that a traced graph holds itself, in place.

    Args:
        module: a GraphModule whose weights are attributes.
        marks: all; a weight is known by its integers and scales.
    """
    for node in list(module.graph.nodes):
        source = node.args[0] if node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS) else None
        if source is None or source.op != "get_attr":
            continue
        values = _attribute(module, source.target)
        mark = next((mark for mark in marks if _holds(mark, values, module, node)), None)
        if mark is not None:
            name = f"mark{mark.first}"
            module.register_buffer(name, mark.tensor(values.shape))
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    module.recompile()


def _holds(mark: Mark, values: Tensor, module: Any, node: Any) -> bool:
    if values.numel() != mark.count or not torch.equal(values.reshape(-1), mark.weight.data.reshape(-1)):
        return False
    scale = node.args[1]
    scale = _attribute(module, scale.target) if node.target is DEQUANTIZE_CHANNELS else torch.tensor(scale)
    expected = mark.weight.scale
    return expected is not None and bool((scale.reshape(-1) == expected.reshape(-1)).all())


def _attribute(module: Any, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    found: Tensor = module
    return found


def find_mark(values: Any, marks: list[Mark]) -> tuple[Mark, Any] | None:
    """Whose weight a constant is, and which of its elements it holds at each place.

    Args:
        values: float32, of any shape.
        marks: all, in order.

    Returns:
        None for another constant.
    """
    bits = np.ascontiguousarray(values).view(np.int32).reshape(-1)
    for mark in marks:
        if len(bits) == mark.count and mark.first <= int(bits[0]) < mark.first + mark.count:
            places = bits.astype(np.int64) - mark.first
            if np.array_equal(np.sort(places), np.arange(mark.count)):
                return mark, places.reshape(values.shape)
    return None
