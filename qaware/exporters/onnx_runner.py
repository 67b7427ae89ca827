"""An ONNX file on ONNX Runtime's CPU provider, with its key-value cache where it has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.base import Runner, first_line
from qaware.exporters.generation import CachedRunner
from qaware.exporters.growing import GrowingRunner
from qaware.exporters.onnx_program import CACHE
from qaware.exporters.signature import Signature


def open_file(path: Path, signature: Signature) -> Runner:
    """Load a file; it computes with as many threads as torch.

    Raises:
        QawareError: ONNX Runtime cannot read it, or its inputs are not those of ``signature``.
    """
    session = _Session(path)
    cache = session.cache
    if cache is not None:
        return CachedRunner(
            int(cache["length"]), signature.longest, GrowingRunner(path.name, session.run, cache["shapes"])
        )
    if len(session.inputs) != len(signature.inputs):
        raise QawareError(
            f"{path.name}: takes {len(session.inputs)} inputs, its signature has {len(signature.inputs)}"
        )
    return lambda *tensors: torch.from_numpy(session.run([_array(t) for t in tensors])[0]).float()


class _Session:
    """Arrays in, arrays out."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.name = path.name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait for the next call without sleeping take time from all others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        except Exception as error:
            raise QawareError(f"{path.name}: ONNX Runtime cannot load it: {first_line(error)}") from error
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    @property
    def cache(self) -> dict[str, Any] | None:
        """The size of its key-value cache."""
        written = self.session.get_modelmeta().custom_metadata_map.get(CACHE)
        return None if written is None else json.loads(written)

    def run(self, arrays: list[Any]) -> list[Any]:
        try:
            results: list[Any] = self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        except Exception as error:
            raise QawareError(f"{self.name}: ONNX Runtime cannot run it: {first_line(error)}") from error
        return results


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()
