"""From a module to a ``.pt2``: trace with open axes, then compile."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaware import quiet
from qaware.engines.x86 import x86_quantizer
from qaware.exporters.aoti_attention import AttendingStep
from qaware.exporters.base import in_evaluation
from qaware.exporters.generation import CacheSpec, StaticStep
from qaware.exporters.signature import Signature

CACHE = "qaware_cache"
"""Key of the package's metadata: the cache's size as JSON."""
_LEVEL = 1
"""Of compression; more takes longer and saves nothing of integers."""
_INDUCTOR: dict[str, Any] = {
    # Debug tables are two thirds of a small file (1.8 MB against 0.6) and a quarter of the compile time.
    "aot_inductor.enable_line_tables": False,
    # The number of threads is the loading process's business; the default compiles in this one's.
    "cpp.dynamic_threads": True,
    # A bfloat16 model rounds between operators; fused without it, it differs from itself by 0.4%.
    "emulate_precision_casts": True,
}


def exported(
    module: nn.Module,
    example: tuple[Tensor, ...],
    signature: Signature,
    cache: CacheSpec | None,
    attends: bool = False,
) -> tuple[Any, int]:
    """The program, and how many of its layers are to be int8 kernels of onednn.

    With a cache its inputs are token ids, their positions, and the cache, of as many tokens as the caller
    likes to hold, which is written in place; ``attends``: the attention is our kernel's.
    """
    # Late: it registers operators, which plans without static activations have no use for.
    from qaware.exporters.qdq import clean, decompose, integer_layers, straighten
    from qaware.exporters.qdq_channels import widen_channels

    decompose(module)
    inputs, axes = _traceable(example, signature), _dynamic(signature)
    wrapped: nn.Module = signature.wrap(module)
    if cache is not None:
        wrapped = AttendingStep(module) if attends else StaticStep(module)
        inputs, axes = _with_cache(inputs[0], axes[0], cache)
    program = torch.export.export(
        in_evaluation(wrapped.cpu()), inputs, dynamic_shapes=_nested(axes, cache), strict=False
    )
    if clean(program.graph_module, torch.uint8, whole=False):
        straighten(program.graph_module)
        widen_channels(program.graph_module)
    return program, integer_layers(program.graph)


def compile_package(program: Any, path: Path, frozen: bool, packed: bool, cache: CacheSpec | None) -> None:
    """Write the package.

    Args:
        program: of ``torch.export``.
        path: where to.
        frozen: for int8 kernels of onednn.
        packed: whether other integers must stay integers.
        cache: kept in the package.
    """
    about = {} if cache is None else {CACHE: json.dumps(dataclasses.asdict(cache))}
    # Late: it imports the compiler.
    from qaware.exporters.aoti_template import register, shared

    register()
    with contextlib.ExitStack() as stack:
        stack.enter_context(shared())
        if frozen:
            x86_quantizer()  # registers the passes that make int8 kernels
            stack.enter_context(_unfolded(packed))
        # A stream keeps the temporary file's name out of the archive.
        stored = io.BytesIO()
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=stored,
            inductor_configs={**_INDUCTOR, "freezing": frozen, "aot_inductor.metadata": about},
        )
    _deflate(stored, path)


def _deflate(stored: io.BytesIO, path: Path) -> None:
    """Write the archive compressed where that saves a tenth: the code's text, and weights of 4 bits with
    their scales. Of floats it would save less, and loading would take several times as long."""
    with zipfile.ZipFile(stored) as archive, zipfile.ZipFile(path, "w") as smaller:
        for entry in archive.infolist():
            data = archive.read(entry)
            saves = len(zlib.compress(data, _LEVEL)) < 0.9 * len(data)
            kind = zipfile.ZIP_DEFLATED if saves else zipfile.ZIP_STORED
            smaller.writestr(entry, data, kind, compresslevel=_LEVEL)


@contextlib.contextmanager
def as_usual() -> Iterator[None]:
    """Without gradients, and with the project's own filters of warnings, in case somebody has reset them
    since the import."""
    with torch.no_grad(), warnings.catch_warnings():
        quiet.install()
        yield


@contextlib.contextmanager
def _unfolded(packed: bool) -> Iterator[None]:
    """Keep freezing from computing, once and for all, the floats of packed integers."""
    from torch._inductor import constant_folding

    ops: Any = torch.ops
    kept = (ops.prims.convert_element_type.default, ops.aten.bitwise_and.Scalar, ops.aten.bitwise_and.Tensor)
    before = list(constant_folding._dont_constant_fold)
    for operator in kept if packed else ():
        constant_folding.add_dont_constant_fold(operator)
    try:
        yield
    finally:
        constant_folding._dont_constant_fold[:] = before


def _with_cache(
    ids: Tensor, axes: dict[int, Any], cache: CacheSpec
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs of a step, and their open axes."""
    held = {2: torch.export.Dim("held", min=2, max=cache.length)} if cache.length > 2 else {}
    tensors = cache.empty(cache.length)
    positions = {0: axes[1]} if 1 in axes else {}
    return (ids, torch.arange(ids.shape[1]), *tensors), (axes, positions, *[held] * len(tensors))


def _nested(axes: tuple[Any, ...], cache: CacheSpec | None) -> tuple[Any, ...]:
    """As the arguments of ``forward`` are: variable ones are a tuple of their own."""
    return (axes,) if cache is None else (*axes[:2], axes[2:])


def _traceable(example: tuple[Tensor, ...], signature: Signature) -> tuple[Tensor, ...]:
    """The example with every dynamic axis at least 2 long, values repeated: 1 would become a constant."""
    inputs = []
    for spec, tensor in zip(signature.inputs, example, strict=True):
        for axis, symbol in enumerate(spec.shape):
            if isinstance(symbol, str) and tensor.shape[axis] < min(2, signature.symbols[symbol][1]):
                tensor = tensor.repeat_interleave(2, axis)
        inputs.append(tensor.detach().cpu().contiguous())
    return tuple(inputs)


def _dynamic(signature: Signature) -> tuple[dict[int, Any], ...]:
    """For each input, the dynamic axes and their bounds; an axis with one legal size is a constant."""
    dims = {
        symbol: torch.export.Dim(symbol, min=low, max=high)
        for symbol, (low, high) in signature.symbols.items()
        if low < high
    }
    return tuple({a: dims[s] for a, s in enumerate(spec.shape) if s in dims} for spec in signature.inputs)
