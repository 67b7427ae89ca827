"""A ``.tflite`` file as Python objects of its schema: reading, adding to it, writing.

Large constants are written behind the flatbuffer, each at a multiple of 16 bytes, which the schema asks for
and Python's flatbuffers do not do; so a file may be larger than 2 GB, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qaware.errors import QawareError
from qaware.exporters.base import first_line

_ALIGNMENT = 16
_LARGE = 1024
"""Bytes from which on a constant is written behind."""
_KEY = b"qaware"
_IDENTIFIER = b"TFL3"


class Flatbuffer:
    """One file in memory."""

    def __init__(self, data: bytes | bytearray) -> None:
        from ai_edge_litert import schema_py_generated
        from ai_edge_litert.tools import flatbuffer_utils

        self.schema: Any = schema_py_generated
        self._tools: Any = flatbuffer_utils
        self.model: Any = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
        kinds: dict[str, Any] = dict(vars(self.schema.BuiltinOperator))
        self._names: dict[int, str] = {code: name for name, code in kinds.items() if isinstance(code, int)}

    def operator(self, op: Any) -> str:
        """Its name, e.g. ``FULLY_CONNECTED``."""
        code = self.model.operatorCodes[op.opcodeIndex]
        return self._names[int(self._tools.get_builtin_code_from_operator_code(code))]

    def values(self, tensor: Any) -> Any:
        """The float32 values of a constant in its shape; None for any other tensor."""
        data = self.model.buffers[tensor.buffer].data
        if data is None or not len(data) or tensor.type != self.schema.TensorType.FLOAT32:
            return None
        shape = [int(size) for size in (tensor.shape if tensor.shape is not None else [])]
        return np.frombuffer(bytes(data), np.float32).reshape(shape)

    def add_buffer(self, data: Any) -> int:
        """Bytes of a new constant, from an array; its number."""
        raw = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
        self.model.buffers.append(self.schema.BufferT(data=raw))
        return len(self.model.buffers) - 1

    def add_tensor(self, graph: Any, name: bytes, shape: Any, kind: str, buffer: int = 0) -> int:
        """A tensor of ``graph``; its number. ``kind`` as of the schema, e.g. ``FLOAT32``."""
        code = getattr(self.schema.TensorType, kind)
        sizes = [int(size) for size in shape]
        graph.tensors.append(self.schema.TensorT(shape=sizes, type=code, buffer=buffer, name=name))
        return len(graph.tensors) - 1

    def add_operator(self, graph: Any, at: int, name: str, inputs: list[int], output: int) -> None:
        """An operator in front of that at ``at``, without options."""
        code = getattr(self.schema.BuiltinOperator, name)
        codes = self.model.operatorCodes
        index = next((i for i, c in enumerate(codes) if c.builtinCode == code), len(codes))
        if index == len(codes):
            # Old readers look at the first field, which has one byte.
            old = min(code, self.schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
            codes.append(self.schema.OperatorCodeT(deprecatedBuiltinCode=old, builtinCode=code))
        made = self.schema.OperatorT(opcodeIndex=index, inputs=inputs, outputs=[output])
        graph.operators.insert(at, made)

    def forget_names(self) -> None:
        """Drop what litert-torch calls the tensors: Python classes on the way to them, in every name."""
        for graph in self.model.subgraphs:
            for tensor in graph.tensors:
                tensor.name = None

    def require_builtin(self) -> None:
        """That the interpreter has every operator.

        Raises:
            QawareError: names one that litert-torch left for somebody else to add.
        """
        left = [op for graph in self.model.subgraphs for op in graph.operators]
        for op in left:
            if self.operator(op) in ("CUSTOM", "STABLEHLO_CUSTOM_CALL"):
                named = self.model.operatorCodes[op.opcodeIndex].customCode
                name = self.operator(op) if named is None else named.decode()
                raise QawareError(
                    f"litert: litert-torch leaves {name} in the file, an operator that LiteRT does not have; "
                    "write the model without it"
                )

    def describe(self, about: dict[str, Any]) -> None:
        """Add data of our own, which :func:`description` reads."""
        buffer = self.add_buffer(np.frombuffer(json.dumps(about).encode(), np.uint8))
        self.model.metadata = [
            *(self.model.metadata or []),
            self.schema.MetadataT(name=_KEY, buffer=buffer),
        ]

    def write(self, path: Path) -> None:
        """Write the file; this object is spent."""
        behind = self._take_large()
        head = self._tools.convert_object_to_bytearray(self.model)
        end = len(head) + -len(head) % _ALIGNMENT
        packed = self.schema.Model.GetRootAs(head)
        for index, data in behind.items():
            self._tools.update_packed_buffer(packed.Buffers(index), offset=end, size=len(data))
            end += len(data) + -len(data) % _ALIGNMENT
        with path.open("wb") as file:
            for part in (head, *behind.values()):
                file.write(part)
                file.write(b"\0" * (-len(part) % _ALIGNMENT))

    def _take_large(self) -> dict[int, bytes]:
        used = {t.buffer for graph in self.model.subgraphs for t in graph.tensors}
        used |= {entry.buffer for entry in self.model.metadata or []}
        found = {}
        for index, buffer in enumerate(self.model.buffers):
            if index not in used:
                buffer.data = None
            if buffer.data is not None and len(buffer.data) >= _LARGE:
                found[index] = bytes(buffer.data)
                # Fields of the default value would not be written, and could not be set afterwards.
                buffer.data, buffer.offset, buffer.size = None, 1, 1
        return found


def description(path: Path) -> dict[str, Any]:
    """What ``describe`` added to a file.

    Raises:
        QawareError: it is no such file, not whole, or not one of ours.
    """
    try:
        return _description(path.read_bytes())
    except Exception as error:
        why = str(error) if isinstance(error, QawareError) else first_line(error)
        raise QawareError(f"{path.name}: LiteRT cannot load it: {why}") from error


def _description(data: bytes) -> dict[str, Any]:
    from ai_edge_litert.schema_py_generated import Model

    if data[4:8] != _IDENTIFIER:
        raise QawareError("it is no .tflite file")
    model = Model.GetRootAs(data)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    # The interpreter would read beyond the end.
    if max(buffer.Offset() + buffer.Size() for buffer in buffers) > len(data):
        raise QawareError("it is cut off; export it again")
    entries = [model.Metadata(i) for i in range(model.MetadataLength())]
    entry = next((entry for entry in entries if entry.Name() == _KEY), None)
    if entry is None:
        raise QawareError("it was not written by qaware")
    held = buffers[entry.Buffer()]
    behind = data[held.Offset() : held.Offset() + held.Size()]
    found: dict[str, Any] = json.loads(behind if held.Offset() else held.DataAsNumpy().tobytes())
    return found
