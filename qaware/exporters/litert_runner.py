"""A ``.tflite`` file on LiteRT's interpreter, for any legal size and with its key-value cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.base import Runner, first_line
from qaware.exporters.generation import CachedRunner
from qaware.exporters.litert_cache import DECODE, PREFILL
from qaware.exporters.litert_flatbuffer import description
from qaware.exporters.litert_sizes import Sizes, run_fixed
from qaware.exporters.signature import Signature
from qaware.exporters.steps import require_given

SERVE = "serve"
_NARROWER = {torch.int64: torch.int32, torch.float64: torch.float32}


def open_file(path: Path, signature: Signature) -> Runner:
    """Load a file; it computes with as many threads as torch.

    Raises:
        QawareError: LiteRT cannot read it, or its inputs are not those of ``signature``.
    """
    about = description(path)
    session = _Session(path)
    if (cache := about.get("cache")) is not None:
        step = _Steps(session, cache["length"], signature.longest, cache["shapes"])
        return CachedRunner(cache["length"], signature.longest, step)
    count = session.inputs(SERVE)
    if count != len(signature.inputs):
        raise QawareError(f"{path.name}: takes {count} inputs, its signature has {len(signature.inputs)}")
    found = about["sizes"]
    sizes = Sizes(found["rows"], found["padded"], tuple((axis, symbol) for axis, symbol in found["cut"]))

    def call(*tensors: Tensor) -> Tensor:
        return torch.from_numpy(session.run(SERVE, [_array(t) for t in tensors])[0]).float()

    return lambda *tensors: run_fixed(call, sizes, signature, tensors)


class _Session:
    """Arrays in, arrays out."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.name = path.name
        try:
            self.interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
            found = self.interpreter.get_signature_list()
            self.runners = {key: self.interpreter.get_signature_runner(key) for key in found}
        except Exception as error:
            raise QawareError(f"{path.name}: LiteRT cannot load it: {first_line(error)}") from error

    def inputs(self, function: str) -> int:
        """How many inputs a function takes."""
        return len(self.runners[function].get_input_details())

    def run(self, function: str, arrays: list[Any]) -> list[Any]:
        """The outputs in order."""
        try:
            found = self.runners[function](**{f"args_{i}": array for i, array in enumerate(arrays)})
        except Exception as error:
            raise QawareError(f"{self.name}: LiteRT cannot run it: {first_line(error)}") from error
        return [found[f"output_{i}"] for i in range(len(found))]


class _Steps:
    """The ``step`` of a :class:`qaware.exporters.generation.CachedRunner`."""

    def __init__(self, session: _Session, length: int, most: int, shapes: list[tuple[int, int]]) -> None:
        self.session, self.length, self.most, self.held = session, length, most, 0
        self.cache: list[Any] = [np.zeros((1, heads, length, dim), np.float32) for heads, dim in shapes]

    def __call__(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits float32 (1, S, V) of int64 ids (1, S) at ``start``.

        Raises:
            QawareError: the tokens before it were not given.
        """
        require_given(self.session.name, start, self.held)
        count = input_ids.shape[1]
        # Padding must not go beyond the cache, whose end LiteRT would overwrite.
        fits = count > 1 and start + self.most <= self.length
        size = self.most if fits else 1
        parts = [self._run(ids, start + i * size, size) for i, ids in enumerate(input_ids.split(size, 1))]
        self.held = start + count
        return torch.cat(parts, 1)

    def _run(self, input_ids: Tensor, start: int, size: int) -> Tensor:
        count = input_ids.shape[1]
        ids = np.zeros((1, size), np.int32)
        ids[:, :count] = _array(input_ids)
        function = PREFILL if size > 1 else DECODE
        logits, *self.cache = self.session.run(function, [ids, np.array([start], np.int32), *self.cache])
        return torch.from_numpy(logits[:, :count])


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return tensor.to(_NARROWER.get(tensor.dtype, tensor.dtype)).contiguous().numpy()
