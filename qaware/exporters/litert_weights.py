"""The integers and scales of a quantized model in the place of the marks in a ``.tflite`` file.

An operator reads a weight in one of three forms:

- *kept*: FULLY_CONNECTED multiplies 4 or 8 bits with a scale for each channel, or 4 bits in blocks with
  bfloat16 scales, and rounds what enters to int8 for each token; EMBEDDING_LOOKUP gives floats of the same;
- *expanded*: a DEQUANTIZE in front of the operator, one scale for each row. For groups the constant has one
  row for each of them, and a RESHAPE follows;
- *half*: float16 and a DEQUANTIZE.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.litert_flatbuffer import Flatbuffer
from qaware.exporters.litert_forms import bits_of, block_of, is_kept
from qaware.exporters.litert_marks import Mark, find_mark

_READERS = {"Linear": "FULLY_CONNECTED", "Embedding": "EMBEDDING_LOOKUP"}
"""Operators that read integers themselves."""


def put_integers(file: Flatbuffer, marks: list[Mark]) -> None:
    """Replace the marks in ``file`` by the integers behind them, stored once for layers that share them.

    Raises:
        QawareError: a weight is not in the file, or an operator reads it that cannot.
    """
    stored = _Stored(file)
    file.forget_names()
    for graph in file.model.subgraphs:
        for index, tensor in enumerate(list(graph.tensors)):
            values = file.values(tensor)
            if values is not None and (found := find_mark(values, marks)):
                _Use(file, graph, index, *found, stored).put()
    lost = [mark.decision.module for mark in marks if mark.decision.module not in stored.seen]
    if lost:
        raise QawareError(
            f"{lost[0]}: its weight is not in the converted file as it is: the model does not use it, or "
            "litert-torch merged it with something else; leave the layer out of the recipe"
        )


class _Stored:
    """Constants that are in the file already, by the weight and the order of its elements."""

    def __init__(self, file: Flatbuffer) -> None:
        self.file = file
        self.seen: set[str] = set()
        self._buffers: dict[tuple[Any, ...], int] = {}

    def integers(self, mark: Mark, places: Any, bits: int) -> int:
        """The buffer of a weight's integers, in the order of ``places``."""
        order = "" if _in_order(places) else places.tobytes()
        key = (mark.weight.data.data_ptr(), order, bits)
        if key not in self._buffers:
            values = mark.weight.data.reshape(-1).numpy()[places.reshape(-1)]
            packed = values if mark.weight.scale is None else pack(values, bits)
            self._buffers[key] = self.file.add_buffer(packed)
        return self._buffers[key]

    def scales(self, mark: Mark, block: int) -> int:
        """The buffer of a weight's scales, float16, one for each block."""
        scale = mark.weight.scale
        assert scale is not None
        key = (scale.data_ptr(), block)
        if key not in self._buffers:
            half = scale.to(torch.float16)
            if not torch.equal(half.to(torch.bfloat16).float(), scale):
                raise QawareError(
                    f"{mark.decision.module}: a scale is out of the range of float16, in which LiteRT has "
                    "those of blocks; use group_size: 0"
                )
            repeats = mark.weight.data.shape[1] // block // scale.shape[1]
            self._buffers[key] = self.file.add_buffer(half.repeat_interleave(repeats, 1).numpy())
        return self._buffers[key]


def pack(values: Any, bits: int) -> Any:
    """int8 (n,) as bytes: 4 bits two in one, the first in the lower half."""
    if bits == 8:
        return values
    pairs = np.pad(values.view(np.uint8) & 15, (0, len(values) % 2)).reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _in_order(places: Any) -> bool:
    return bool(np.array_equal(places.reshape(-1), np.arange(places.size)))


class _Use:
    """One constant of one graph that is a weight."""

    def __init__(
        self, file: Flatbuffer, graph: Any, index: int, mark: Mark, places: Any, stored: _Stored
    ) -> None:
        self.file, self.graph, self.index = file, graph, index
        self.mark, self.places, self.stored = mark, places, stored
        self.tensor = graph.tensors[index]
        assert mark.decision.scheme is not None
        self.scheme = mark.decision.scheme
        self._bits = bits_of(self.scheme, mark.decision.width)

    def put(self) -> None:
        """Give each operator that reads it the form that it needs."""
        readers = [op for op in self.graph.operators if self.index in list(op.inputs)]
        if not readers:
            return
        decision = self.mark.decision
        self.stored.seen.add(decision.module)
        kept = [op for op in readers if self._is_kept(op)]
        expanded = [op for op in readers if not any(op is other for other in kept)]
        if expanded:
            self._require_floats(expanded)
            made = self._expand(self.graph.operators.index(expanded[0]))
            for op in expanded:
                op.inputs = [made if i == self.index else i for i in op.inputs]
        if kept:
            self._keep(self.tensor)
        else:
            self.tensor.buffer = 0

    def _is_kept(self, op: Any) -> bool:
        decision = self.mark.decision
        wanted = _READERS.get(decision.type)
        is_weight = len(op.inputs) > 1 and op.inputs[1] == self.index
        return is_kept(decision) and self.file.operator(op) == wanted and is_weight and _in_order(self.places)

    def _require_floats(self, readers: list[Any]) -> None:
        """That none of the operators ought to round what enters."""
        decision = self.mark.decision
        assert decision.scheme is not None
        if decision.type == "Linear" and decision.scheme.activation == "int8-dynamic":
            raise QawareError(
                f"{decision.module}: litert-torch made {self.file.operator(readers[0])} of it, which does "
                "not round its activations to int8; use activation: none"
            )

    def _keep(self, tensor: Any) -> None:
        block = block_of(self.scheme, self.mark.decision.width)
        tensor.buffer = self.stored.integers(self.mark, self.places, self._bits)
        tensor.name = self._name("weight")
        self._set_kind(tensor)
        if block:
            tensor.quantization = self._blocks(block)
        else:
            tensor.quantization = self._rows(self.mark.weight.scale, None, 0)

    def _expand(self, at: int) -> int:
        """Operators in front of that at ``at``; the number of the float tensor that they give."""
        floats = self._new("float", list(self.places.shape), "FLOAT32")
        weight = self.mark.weight
        if weight.scale is None or weight.scale.shape[1] == 1:
            source = self._new("weight", list(self.places.shape), "FLOAT16")
            self._store(source, weight, self._axis() if weight.scale is not None else 0)
            self.file.add_operator(self.graph, at, "DEQUANTIZE", [source], floats)
            return floats
        if not _in_order(self.places):
            raise QawareError(
                f"{self.mark.decision.module}: litert-torch transposes its weight, which cuts its groups; "
                "use group_size: 0"
            )
        rows = [weight.scale.numel(), weight.data.numel() // weight.scale.numel()]
        source, between = self._new("weight", rows, "INT8"), self._new("rows", rows, "FLOAT32")
        self._store(source, weight, 0)
        shape = self._new("shape", [self.places.ndim], "INT32")
        self.graph.tensors[shape].buffer = self.file.add_buffer(np.array(self.places.shape, np.int32))
        self.file.add_operator(self.graph, at, "RESHAPE", [between, shape], floats)
        self.file.add_operator(self.graph, at, "DEQUANTIZE", [source], between)
        return floats

    def _store(self, index: int, weight: Any, axis: int) -> None:
        tensor = self.graph.tensors[index]
        tensor.buffer = self.stored.integers(self.mark, self.places, self._bits)
        if weight.scale is not None:
            self._set_kind(tensor)
            tensor.quantization = self._rows(weight.scale, weight.zero_point, axis)

    def _axis(self) -> int:
        """The axis of the constant along which the rows of the weight lie."""
        rows, width = self.mark.weight.data.shape
        owners = self.places // width
        for axis in range(owners.ndim):
            lines = np.moveaxis(owners, axis, 0).reshape(owners.shape[axis], -1)
            if len(lines) == rows and (lines == np.arange(rows)[:, None]).all():
                return axis
        raise QawareError(
            f"{self.mark.decision.module}: litert-torch mixes the rows of its weight, which have a scale "
            "each; leave the layer out of the recipe"
        )

    def _new(self, leaf: str, shape: list[int], kind: str) -> int:
        return self.file.add_tensor(self.graph, self._name(leaf), shape, kind)

    def _name(self, leaf: str) -> bytes:
        return f"{self.mark.decision.module}.{leaf}".encode()

    def _set_kind(self, tensor: Any) -> None:
        tensor.type = getattr(self.file.schema.TensorType, f"INT{self._bits}")

    def _rows(self, scale: Tensor | None, zero_point: Tensor | None, axis: int) -> Any:
        assert scale is not None
        zeros = np.zeros(scale.numel()) if zero_point is None else zero_point.reshape(-1).numpy()
        return self.file.schema.QuantizationParametersT(
            scale=scale.reshape(-1).numpy().astype(np.float32),
            zeroPoint=zeros.astype(np.int64),
            quantizedDimension=axis,
        )

    def _blocks(self, block: int) -> Any:
        rows, width = self.mark.weight.data.shape
        scales = self._new("scales", [rows, width // block], "FLOAT16")
        self.graph.tensors[scales].buffer = self.stored.scales(self.mark, block)
        schema = self.file.schema
        return schema.QuantizationParametersT(
            detailsType=schema.QuantizationDetails.BlockwiseQuantization,
            details=schema.BlockwiseQuantizationT(scales=scales, zeroPoints=-1, blockSize=block),
        )
