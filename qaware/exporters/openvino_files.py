"""A folder of OpenVINO's IR: how it is written, and how it is run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qaware.errors import QawareError
from qaware.exporters.base import Runner, first_line
from qaware.exporters.generation import CachedRunner, CacheSpec
from qaware.exporters.growing import GrowingRunner
from qaware.exporters.onnx_program import write_onnx
from qaware.exporters.openvino_layers import HALF_BYTE
from qaware.exporters.signature import Signature

_CACHE = "cache.json"
_MODEL, _WEIGHTS = "model.xml", "model.bin"
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def write_folder(
    module: nn.Module,
    bits: dict[str, int],
    example: tuple[Tensor, ...],
    signature: Signature,
    cache: CacheSpec | None,
    path: Path,
) -> None:
    """Write the folder ``path``.

    Args:
        module: with the layers of ``use_plain``.
        bits: of its weights, as that returned them.
        example, signature, cache: as of ``write_onnx``.
    """
    import openvino

    path.mkdir()
    traced = path / "traced.onnx"
    write_onnx(module, example, signature, cache, traced)
    model = openvino.Core().read_model(str(traced))
    narrow = {f"module.{name}." for name, width in bits.items() if width == HALF_BYTE}
    held = _narrow(model, narrow)
    openvino.save_model(model, str(path / _MODEL), compress_to_fp16=False)
    del held  # whose memory the constants share
    traced.unlink()
    about = None if cache is None else dataclasses.asdict(cache)
    (path / _CACHE).write_text(json.dumps(about), encoding="utf-8")


def _narrow(model: Any, prefixes: set[str]) -> list[Any]:
    """Replace the integers of weights of these names by constants of 4 bits; the arrays that are returned
    must live until the model is saved, as the constants share their memory."""
    from openvino import Tensor as Values
    from openvino import Type
    from openvino.op import Constant

    held = []
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != "Constant" or name.rpartition(".")[0] + "." not in prefixes:
            continue
        data = node.get_data()
        if data.dtype not in (np.int8, np.uint8):
            continue
        pairs = np.pad(data.reshape(-1).view(np.uint8) & 15, (0, data.size % 2)).reshape(-1, 2)
        packed = np.ascontiguousarray(pairs[:, 0] | (pairs[:, 1] << 4))
        kind = Type.i4 if data.dtype == np.int8 else Type.u4
        constant = Constant(Values(packed, list(data.shape), kind))
        constant.set_friendly_name(name)
        node.output(0).replace(constant.output(0))
        held.append(packed)
    return held


def open_folder(path: Path, signature: Signature) -> Runner:
    """Load a folder; it computes in float32 with as many threads as torch.

    Raises:
        QawareError: OpenVINO cannot read it, or its inputs are not those of ``signature``.
    """
    compiled, cache = _compiled(path)
    count = len(compiled.inputs)

    def run(arrays: list[Any]) -> list[Any]:
        try:
            found = compiled(arrays)
        except Exception as error:
            raise QawareError(f"{path.name}: OpenVINO cannot run it: {first_line(error)}") from error
        # Copies: the arrays are the compiled model's.
        return [np.array(found[i]) for i in range(len(found))]

    if cache is not None:
        return CachedRunner(
            int(cache["length"]), signature.longest, GrowingRunner(path.name, run, cache["shapes"])
        )
    if count != len(signature.inputs):
        raise QawareError(f"{path.name}: takes {count} inputs, its signature has {len(signature.inputs)}")
    return lambda *tensors: torch.from_numpy(run([t.detach().cpu().numpy() for t in tensors])[0]).float()


def _compiled(path: Path) -> tuple[Any, dict[str, Any] | None]:
    import openvino

    try:
        cache = json.loads((path / _CACHE).read_text(encoding="utf-8"))
        model = openvino.Core().read_model(path / _MODEL, path / _WEIGHTS)
        settings = {**_EXACT, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        return openvino.Core().compile_model(model, "CPU", settings), cache
    except Exception as error:
        raise QawareError(f"{path.name}: OpenVINO cannot load it: {first_line(error)}") from error
