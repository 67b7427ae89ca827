"""How tract's NNEF archive stores a quantized weight: Q4_0 blocks, int8 or float16.

Q4_0 is the block of 32 of ggml (``block_q4_0`` in ggml-common.h) and of tract
(``linalg/src/frame/block_quant/q4_0.rs``): a float16 scale, then 16 bytes whose low halves are the
integers 0 to 15 and whose high halves are 16 to 31, each plus 8. Its value is exactly
``(half - 8) * scale``, computed in float32 on x86.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from nnef_tools.model import Graph, Operation
from nnef_tools.model import Tensor as Node
from torch_to_nnef.nnef_io.tensor import DatBinHeader

from qaware.engines.base import QuantizedWeight
from qaware.errors import QawareError
from qaware.exporters.tract import Q40_BITS, Q40_BLOCK
from qaware.exporters.tract_unpack import fence, linear_of, unpack

_READS_Q40 = ("linear", "unsqueeze", "tract_core_gather", "conv")
_MOVES_AXES = ("reshape", "transpose", "unsqueeze", "squeeze")


class Stored(NamedTuple):
    """One weight and where it goes."""

    layer: str
    label: str
    """Of its variable; the file is ``<label>.dat``."""
    weight: QuantizedWeight


def store_weights(graph: Graph, weights: Mapping[str, Stored]) -> dict[str, bytes]:
    """Replace the float variables of ``graph`` by what ships.

    Args:
        graph: as built by torch_to_nnef, before it is written.
        weights: by the label of the float variable.

    Returns:
        Files that torch_to_nnef cannot write, by name; the graph holds empty tensors for them.

    Raises:
        QawareError: a scale is not exact in float16, or the model uses a weight in a way that keeps
            it from being stored as integers.
    """
    files: dict[str, bytes] = {}
    variables = [op for op in graph.operations if op.type == "variable"]
    found = [op for op in variables if op.attribs["label"] in weights]
    lost = {id(s.weight): s for s in weights.values()}
    # Packed weights last: what was put in the graph for the others is part of their surroundings.
    for op in sorted(found, key=lambda op: _is_packed(weights[op.attribs["label"]].weight)):
        stored = weights[op.attribs["label"]]
        lost.pop(id(stored.weight), None)
        # Of tied names torch_to_nnef takes any.
        op.attribs["label"] = stored.label
        files.update(_store(graph, op, stored))
    _refuse_folded(variables, lost.values())
    return files


def _refuse_folded(variables: list[Operation], lost: Iterable[Stored]) -> None:
    """A layer that the model never calls may be lost, but not one that became another constant."""
    # Names of parameters have dots here, as they begin with a module's; those of constants have none.
    folded = {math.prod(op.attribs["shape"]) for op in variables if "." not in op.attribs["label"]}
    for layer, _, weight in lost:
        if weight.data.numel() in folded:
            raise _misused(layer, "in a constant expression")


def _misused(layer: str, how: str) -> QawareError:
    return QawareError(
        f"{layer}: tract: the model uses this weight {how}, which cannot be done on stored integers; "
        "call the layer instead, or keep it float by a rule"
    )


def _is_packed(weight: QuantizedWeight) -> bool:
    return weight.scheme.stored_bits <= Q40_BITS


def _store(graph: Graph, op: Operation, stored: Stored) -> dict[str, bytes]:
    if not _is_packed(stored.weight):
        unpack(graph, op, stored.label, stored.weight)
        return {}
    _declare_q40(graph, op, stored.layer)
    return {f"{stored.label}.dat": _q40(stored.layer, stored.weight, op.output.shape)}


def _declare_q40(graph: Graph, op: Operation, layer: str) -> None:
    op.output.data = np.zeros(0, np.float32)
    for reader in list(op.output.consumers):
        if reader.type not in _READS_Q40 or reader.attribs.get("axis", 0) != 0:
            raise _misused(layer, f"with the operation {reader.type}")
        if reader.type == "tract_core_gather":
            # Packed rows do not say what they are to be unpacked to.
            reader.attribs["datum_type"] = "f32"
            fence(graph, reader.output)
        elif (linear := linear_of(reader, op.output)) and _is_concat(linear.inputs[0]):
            fence(graph, linear.inputs[0])


def _is_concat(node: Node) -> bool:
    """Whether ``node`` is put together from parts, whatever its axes went through after that."""
    while node.producer is not None and node.producer.type in _MOVES_AXES:
        node = node.producer.inputs[0]
    return node.producer is not None and node.producer.type in ("concat", "stack")


def _q40(layer: str, weight: QuantizedWeight, shape: tuple[int, ...]) -> bytes:
    """The whole .dat file: a header of 128 bytes with the weight's own shape, then 18 bytes for each 32
    weights."""
    assert weight.scale is not None
    width = weight.data.shape[1]
    scale = _exact_float16(layer, weight)
    # Larger groups, or the one group of a channel, repeat their scale in each of their blocks.
    scale = scale.repeat_interleave(width // Q40_BLOCK // scale.shape[1], dim=1)
    integers = (weight.data.reshape(-1, 2, Q40_BLOCK // 2) + 8).to(torch.uint8)
    halves = integers[:, 0] | (integers[:, 1] << 4)
    blocks = torch.cat([scale.reshape(-1, 1).view(torch.uint8), halves], dim=1)
    header = DatBinHeader.build_tract_qtensor(DatBinHeader.TractCustomTypes.Q40, tuple(shape))
    return bytes(header.to_bytes()) + blocks.numpy().tobytes()


def _exact_float16(layer: str, weight: QuantizedWeight) -> torch.Tensor:
    assert weight.scale is not None
    # A group of zeros, such as the row of a padding token, is exact with any scale; torchao gives it
    # the smallest float32, which float16 has not.
    used = weight.data.reshape(*weight.scale.shape, -1).any(dim=-1)
    scale = weight.scale.where(used, 0.0)
    rounded = scale.half()
    different = scale[rounded.float() != scale]
    if different.numel():
        raise QawareError(
            f"{layer}: tract: scale {float(different[0]):.6g} is not exact in the float16 of Q4_0 "
            f"({different.numel()} of {scale.numel()} are not); give this layer bits: 8, or bits: 16"
        )
    return rounded
