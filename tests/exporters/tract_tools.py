"""What the tests of the tract exporter share."""

from __future__ import annotations

import copy
import io
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny import SIGNATURE, quantize, tokens
from torch import Tensor, nn

from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.engines.modules import ModulesEngine
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Runner
from qaware.exporters.signature import Signature
from qaware.parity import Parity, compare
from qaware.recipe import Recipe, recipe_names

EXPORTER = get_exporter("tract")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)
NOISE = 5e-7
"""Measured at most 3e-7 here; the exporter's tolerance leaves room for deeper models."""
# Linear layers of int4-static have scales that Q4_0 lacks; they ship as int8, by another engine.
RECIPES = [name for name in recipe_names() if name != "int4-static"]
INT4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}


class Made(NamedTuple):
    quantized: QuantizedModel
    artifact: Artifact
    run: Runner
    files: dict[str, bytes]


def convert(model: nn.Module, recipe: str | dict) -> QuantizedModel:
    work = copy.deepcopy(model).eval()
    plan = Recipe.load(recipe).match(work)
    engine = ModulesEngine()
    return engine.convert(engine.prepare(work, plan), plan)


def everywhere(scheme: dict) -> dict:
    return {"name": "all", "rules": [{"type": t, "scheme": scheme} for t in ("Embedding", "Linear")]}


def make(quantized: QuantizedModel, path: Path, signature: Signature, *example: Tensor) -> Made:
    artifact = EXPORTER.export(quantized, example, signature, path)
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}
    return Made(quantized, artifact, EXPORTER.open(path, signature), files)


def distance(made: Made, *inputs: tuple[Tensor, ...]) -> Parity:
    reference = made.artifact.signature.wrap(EXPORTER.reference(made.quantized)).eval()
    return compare(made.run, reference, inputs)


_FOLDER = tempfile.TemporaryDirectory(prefix="qaware-tract-")


@cache
def tiny(recipe: str, tie: bool = False) -> Made:
    """TinyLM, exported once for each recipe and tie."""
    # The shortest legal example: the exporter has to build one that it can trace.
    path = Path(_FOLDER.name) / f"{recipe}-{tie}.nnef.tgz"
    return make(quantize(recipe, tie), path, SIGNATURE, tokens(1))


def stored_integers(files: dict[str, bytes], label: str) -> tuple[Tensor, Tensor | None]:
    """Integers (rows, width) and scales of one weight, read from the bytes of the archive."""
    import nnef

    data = files[f"{label}.dat"]
    shape = np.frombuffer(data, np.uint32, 2, 12)
    if data[48:52] == b"\x40\x30RT":  # item type 0x3040 of vendor 0x5452: Q4_0
        blocks = np.frombuffer(data, np.uint8, offset=128).reshape(-1, 18)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        halves = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.int8) - 8
        return torch.from_numpy(halves.reshape(shape)), torch.from_numpy(scale.reshape(shape[0], -1))
    integers = torch.from_numpy(nnef.read_tensor(as_file(data)).copy())
    scale = files.get(f"{label}_scale.dat")
    return integers.flatten(1), None if scale is None else torch.from_numpy(
        nnef.read_tensor(as_file(scale)).copy()
    )


def as_file(data: bytes) -> io.BytesIO:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False  # nnef would ask a seekable file for its descriptor

    return Pipe(data)


def same_integers(weight: QuantizedWeight, files: dict[str, bytes], label: str) -> bool:
    data, scale = stored_integers(files, label)
    if weight.scale is None:
        return data.dtype == torch.float16 and torch.equal(data, weight.data)
    repeats = scale.flatten(1).shape[1] // weight.scale.shape[1]
    wanted = weight.scale.repeat_interleave(repeats, dim=1)
    return torch.equal(data, weight.data) and torch.equal(scale.flatten(1), wanted)
