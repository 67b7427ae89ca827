"""A ``.pt2`` in this process: native code, and the key-value cache that it is given."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qaware import machine
from qaware.errors import QawareError
from qaware.exporters.aoti_compile import CACHE
from qaware.exporters.base import Runner
from qaware.exporters.generation import CachedRunner, CacheSpec
from qaware.exporters.signature import Signature

_MODEL = "model"  # the name inside the package, torch's default
# What a file compiled for AOTI_CPU_ISA needs, in the words of /proc/cpuinfo.
_FEATURES = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni", "AMX_TILE": "amx_bf16"}
_GROWTH = 64
"""Tokens by which a cache grows: every step attends to all of it, seen or not."""


def load(path: Path) -> Any:
    """The native model of a package.

    Unpacked here rather than by torch: its own copy in the temporary folder outlives a killed process,
    and damage is noticed by the checksums. And not by ``aoti_load_package``: with a cold cache that
    compiles ten probes of this CPU (14 s, and it needs a compiler), only to warn when they differ.
    """
    with tempfile.TemporaryDirectory(prefix="qaware-aoti-", ignore_cleanup_errors=True) as folder:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        _require_features(path, Path(folder))
        return torch._C._aoti.AOTIModelPackageLoader(folder, _MODEL, False, 1, -1)


def runner(loader: Any, signature: Signature) -> Runner:
    """What calls the model, with a key-value cache where it takes one."""
    stored = loader.get_metadata().get(CACHE)
    if stored is not None:
        cache = json.loads(stored)
        spec = CacheSpec(cache["length"], tuple((heads, dim) for heads, dim in cache["shapes"]))
        return CachedRunner(spec.length, signature.longest, Steps(loader, spec))

    def run(*tensors: Tensor) -> Tensor:
        # The example's strides are compiled in and not checked.
        output: Tensor = loader.run([t.detach().cpu().contiguous() for t in tensors])[0]
        return output.float()

    return run


class Steps:
    """Steps of a language model, and its cache, which holds as many tokens as were needed so far."""

    def __init__(self, loader: Any, cache: CacheSpec) -> None:
        self.loader, self.spec = loader, cache
        self.held: list[Tensor] = cache.empty(min(_GROWTH, cache.length))

    def __call__(self, input_ids: Tensor, start: int) -> Tensor:
        """float32 logits (1, S, V) of int64 ids (1, S)."""
        end = start + input_ids.shape[1]
        self._hold(end)
        inputs = [input_ids.detach().cpu().contiguous(), torch.arange(start, end), *self.held]
        output: Tensor = self.loader.run(inputs)[0]
        return output.float()

    def _hold(self, tokens: int) -> None:
        """Room for at least so many tokens, and little more: what is held is multiplied, seen or not."""
        size = min(-(-tokens // _GROWTH) * _GROWTH, self.spec.length)
        now = self.held[0].shape[2]
        if size == now:
            return
        kept = min(size, now)
        larger = self.spec.empty(size)
        for new, old in zip(larger, self.held, strict=True):
            new[:, :, :kept] = old[:, :, :kept]
        self.held = larger


def _require_features(path: Path, folder: Path) -> None:
    """Vector instructions that a CPU lacks end the process, so they are compared first."""
    metadata = next(folder.rglob("*wrapper_metadata.json"), None)
    isa = json.loads(metadata.read_text(encoding="utf-8")).get("AOTI_CPU_ISA", "") if metadata else ""
    here = machine.cpu()["features"]
    lacking = [name for name in isa.split() if name in _FEATURES and _FEATURES[name] not in here]
    if lacking:
        raise QawareError(
            f"{path}: was compiled for a CPU with {', '.join(lacking)}, which this one lacks; export it here"
        )
