"""An archive on tract, with its key-value cache where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.base import Runner
from qaware.exporters.generation import CachedRunner
from qaware.exporters.signature import Signature
from qaware.exporters.steps import require_given
from qaware.exporters.tract_programs import CACHE_LENGTH, Programs, vectors


def open_archive(path: Path, signature: Signature) -> Runner:
    """Load an archive.

    Raises:
        QawareError: tract cannot read it, or its inputs are not those of ``signature``.
    """
    programs = Programs(path)
    length = int(programs.properties.get(CACHE_LENGTH) or 0)
    if length:
        return CachedRunner(length, signature.longest, _Steps(programs))
    count = len(programs.inputs)
    if count != len(signature.inputs):
        raise QawareError(f"{path.name}: takes {count} inputs, its signature has {len(signature.inputs)}")

    def run(*tensors: Tensor) -> Tensor:
        most = max((vectors(tensor) for tensor in tensors), default=1)
        return _tensor(programs.run([_array(tensor) for tensor in tensors], most)[0])

    return run


class _Steps:
    """Keeps what tract gave back of the tokens so far, and hands it in with the next ones."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        # 1,heads,P,dim,f32
        shapes = [fact.split(",") for fact in programs.inputs[1:]]
        self.empty = [np.zeros((1, int(s[1]), 0, int(s[3])), np.float32) for s in shapes]
        # By the number of tokens: after the last step and before it, as a step is often tried again.
        self.kept: dict[int, list[Any]] = {}

    def __call__(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits float32 (1, S, V) of int64 ids (1, S) at ``start``."""
        past, end = self._until(start), start + input_ids.shape[1]
        logits, *present = self.programs.run([_array(input_ids), *past], vectors(input_ids))
        self.kept = {start: past, end: present}
        return _tensor(logits)

    def _until(self, start: int) -> list[Any]:
        if start == 0:
            return self.empty
        if start in self.kept:
            return self.kept[start]
        held = max(self.kept, default=0)
        require_given(self.programs.path.name, start, held)
        return [np.ascontiguousarray(tensor.to_numpy()[:, :, :start]) for tensor in self.kept[held]]


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _tensor(output: Any) -> Tensor:
    # A copy: the array belongs to tract.
    return torch.from_numpy(np.array(output.to_numpy(), dtype=np.float32))
