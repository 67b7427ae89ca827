"""Int8 operators in a ``.tflite`` file, in place of float ones between QUANTIZE and DEQUANTIZE.

litert-torch can make them itself, but refuses networks that a residual addition or a padding is in. Here
only operators are replaced whose integers are the same: products, whose sums are exact in both, and those
that move values. All others stay between their DEQUANTIZE and QUANTIZE.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from qaware.exporters.litert_flatbuffer import Flatbuffer

_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_MOVES = ("MAX_POOL_2D", "RESHAPE", "TRANSPOSE", "PAD", "CONCATENATION")


def use_integers(file: Flatbuffer) -> int:
    """Replace what can be, in place; returns how many products are of integers."""
    return sum(_Graph(file, graph).replace() for graph in file.model.subgraphs)


class _Graph:
    """One function of a file."""

    def __init__(self, file: Flatbuffer, graph: Any) -> None:
        self.file, self.graph = file, graph
        self.types: Any = file.schema.TensorType

    def replace(self) -> int:
        """Returns the number of products."""
        made = 0
        if not any(self.file.operator(op) == "QUANTIZE" for op in self.graph.operators):
            return made
        for op in list(self.graph.operators):
            name = self.file.operator(op)
            if name in _PRODUCTS:
                made += self._product(op)
            elif name in _MOVES:
                self._move(op)
            elif name == "QUANTIZE":
                self._drop_round_trip(op)
        self._drop_unused()
        return made

    def _product(self, op: Any) -> bool:
        source, weight = self._integers(op.inputs[0]), self._integers(op.inputs[1])
        end = self._rounding(op.outputs[0])
        bias = op.inputs[2] if len(op.inputs) > 2 else -1
        if source is None or weight is None or end is None:
            return False
        if bias >= 0 and self.file.values(self.graph.tensors[bias]) is None:
            return False
        op.inputs = [source, weight, -1 if bias < 0 else self._whole_bias(bias, source, weight)]
        self._end(op, end)
        return True

    def _move(self, op: Any) -> None:
        """Where all that enters is on one grid, what leaves is, too; a zero of a padding is on every grid."""
        moved = list(op.inputs) if self.file.operator(op) == "CONCATENATION" else list(op.inputs)[:1]
        sources = [source for index in moved if (source := self._integers(index)) is not None]
        if len(sources) < len(moved) or any(self._grid(s) != self._grid(sources[0]) for s in sources):
            return
        op.inputs = [*sources, *list(op.inputs)[len(moved) :]]
        floats, first = op.outputs[0], self.graph.tensors[sources[0]]
        made = self.file.add_tensor(self.graph, b"moved", self.graph.tensors[floats].shape, "INT8")
        self.graph.tensors[made].quantization = first.quantization
        op.outputs = [made]
        self.file.add_operator(self.graph, self.graph.operators.index(op) + 1, "DEQUANTIZE", [made], floats)

    def _end(self, op: Any, end: Any) -> None:
        """What is rounded to is the result of the operator itself."""
        op.outputs = list(end.outputs)
        self.graph.operators.remove(end)

    def _drop_round_trip(self, op: Any) -> None:
        """What is on a grid is not changed by rounding to it."""
        source = self._integers(op.inputs[0])
        if source is None or self._grid(source) != self._grid(op.outputs[0]):
            return
        for reader in self.graph.operators:
            reader.inputs = [source if i == op.outputs[0] else i for i in reader.inputs]

    def _integers(self, index: int) -> int | None:
        """The int8 tensor behind a float one."""
        maker = next((op for op in self.graph.operators if index in list(op.outputs)), None)
        if maker is None or self.file.operator(maker) != "DEQUANTIZE":
            return None
        source = int(maker.inputs[0])
        return source if self.graph.tensors[source].type == self.types.INT8 else None

    def _rounding(self, index: int) -> Any:
        """The QUANTIZE to int8 that is all that reads a tensor."""
        readers = [op for op in self.graph.operators if index in list(op.inputs)]
        if len(readers) != 1 or index in list(self.graph.outputs):
            return None
        is_int8 = self.graph.tensors[readers[0].outputs[0]].type == self.types.INT8
        return readers[0] if self.file.operator(readers[0]) == "QUANTIZE" and is_int8 else None

    def _grid(self, index: int) -> tuple[list[float], list[int]]:
        found = self.graph.tensors[index].quantization
        if found is None or found.scale is None:
            return [], []
        return list(found.scale), list(found.zeroPoint)

    def _whole_bias(self, bias: int, source: int, weight: int) -> int:
        """The bias as the int32 that the kernels add, in units of input scale times weight scale."""
        values = self.file.values(self.graph.tensors[bias])
        unit = np.float64(self._grid(source)[0][0]) * np.array(self._grid(weight)[0], np.float64)
        whole = np.clip(np.rint(values.reshape(-1) / unit), -(2**31), 2**31 - 1).astype(np.int32)
        buffer = self.file.add_buffer(whole)
        made = self.file.add_tensor(self.graph, b"bias", [len(whole)], "INT32", buffer)
        zeros = np.zeros(len(unit), np.int64)
        self.graph.tensors[made].quantization = self.file.schema.QuantizationParametersT(
            scale=unit.astype(np.float32), zeroPoint=zeros
        )
        return made

    def _drop_unused(self) -> None:
        """Operators that nothing reads from any more."""
        read = Counter(int(i) for op in self.graph.operators for i in op.inputs)
        read.update(int(i) for i in self.graph.outputs)
        for op in reversed(list(self.graph.operators)):
            if not any(read[int(i)] for i in op.outputs):
                self.graph.operators.remove(op)
                read.subtract(int(i) for i in op.inputs)
