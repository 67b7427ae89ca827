"""From a module to an ONNX file: traced by torch.export with open axes, without the names of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaware.errors import QawareError
from qaware.exporters.base import in_evaluation
from qaware.exporters.generation import CacheSpec, GrowingStep
from qaware.exporters.signature import Signature

CACHE = "qaware_cache"
"""Key of the file's metadata: the cache's size as JSON."""
_LARGEST = 2**31 - 2**20
"""Bytes that one protobuf message holds."""


def write_onnx(
    module: nn.Module,
    example: tuple[Tensor, ...],
    signature: Signature,
    cache: CacheSpec | None,
    path: Path,
) -> None:
    """Write ``path``.

    With a cache the inputs are token ids, keys and values; the outputs logits, keys and values, by the names
    that ``transformers`` and ONNX Runtime GenAI give them.

    Raises:
        QawareError: the model is too large for one file.
    """
    # Late: it registers operators, which plans without static activations have no use for.
    from qaware.exporters.qdq import clean, decompose

    decompose(module)
    inputs, axes = _open(example, signature)
    wrapped: nn.Module = signature.wrap(module)
    if cache is not None:
        past = cache.empty(3)
        wrapped, inputs = GrowingStep(module), (*inputs, *past)
        held: Any = torch.export.Dim.DYNAMIC
        axes = ({1: held}, *[{2: held}] * len(past))
    wrapped = in_evaluation(wrapped.requires_grad_(False).cpu())
    nested: Any = (axes,) if cache is None else (axes[0], axes[1:])
    with _quietly():
        program = torch.export.export(wrapped, inputs, dynamic_shapes=nested, strict=False)
        if clean(program.graph_module, torch.uint8, whole=True):
            _keep_parts(program.graph_module)
        names, results = _names(signature, cache)
        made: Any = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=results, verbose=False, optimize=False
        )
        _simplify(made.model)
    _save(made.model, signature, cache, path)


def _keep_parts(module: Any) -> None:
    """Concatenate parts on the grids that they are on, in place: ONNX Runtime has an operator for it, and
    would make one grid of two in a row, which neither has."""
    from qaware.exporters.qdq import DEQUANTIZE, QUANTIZE

    def first(part: Any) -> Any:
        integers = part.args[0] if part.target is DEQUANTIZE else None
        source = integers.args[0] if integers is not None and integers.target is QUANTIZE else None
        return part if source is None or source.target is not DEQUANTIZE else source

    for node in module.graph.nodes:
        if node.target in (torch.ops.aten.cat.default, torch.ops.aten.concat.default):
            node.args = ([first(part) for part in node.args[0]], *node.args[1:])
    module.graph.eliminate_dead_code()
    module.recompile()


def _names(signature: Signature, cache: CacheSpec | None) -> tuple[list[str], list[str]]:
    inputs = [spec.name for spec in signature.inputs]
    if cache is None:
        return inputs, ["output"]
    pairs = [(i // 2, ("key", "value")[i % 2]) for i in range(len(cache.shapes))]
    past = [f"past_key_values.{layer}.{kind}" for layer, kind in pairs]
    return [*inputs, *past], ["logits", *(f"present.{layer}.{kind}" for layer, kind in pairs)]


def _open(example: Sequence[Tensor], signature: Signature) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The example with every dynamic axis at least 2 long, as a 1 would become a constant; and those axes."""
    open_axes: Any = torch.export.Dim.DYNAMIC
    inputs, axes = [], []
    for spec, tensor in zip(signature.inputs, example, strict=True):
        found = {}
        for axis, symbol in enumerate(spec.shape):
            if isinstance(symbol, str) and signature.symbols[symbol][0] < signature.symbols[symbol][1]:
                found[axis] = open_axes
                tensor = tensor.repeat_interleave(2, axis) if tensor.shape[axis] < 2 else tensor
        inputs.append(tensor.detach().cpu().contiguous())
        axes.append(found)
    return tuple(inputs), tuple(axes)


def _simplify(model: Any) -> None:
    """Compute what is constant, but expand no weight and no scale: that is left to the runtime."""
    from onnxscript import ir, optimizer

    types = ir.DataType
    narrow = (types.UINT8, types.INT8, types.FLOAT16, types.BFLOAT16)

    def is_held(value: Any) -> bool:
        stored = value is not None and value.is_initializer() and value.dtype is types.FLOAT
        return stored or (value is not None and value.dtype in narrow)

    def fold(node: Any) -> bool | None:
        return False if any(is_held(value) for value in node.inputs) else None

    optimizer.optimize_ir(model, should_fold=fold)


def _save(model: Any, signature: Signature, cache: CacheSpec | None, path: Path) -> None:
    import onnx
    from onnxscript import ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > _LARGEST:
        raise QawareError(f"onnx: {size:,} bytes of weights are more than one file of 2 GB holds")
    proto = ir.serde.serialize_model(model)
    _forget(proto)
    _name_axes(proto.graph, signature)
    about = {} if cache is None else {CACHE: json.dumps(dataclasses.asdict(cache))}
    onnx.helper.set_model_props(proto, about)
    path.write_bytes(proto.SerializeToString())


def _forget(proto: Any) -> None:
    """Drop the exporter's records of where each operator is from: Python files, by their path. Shapes in
    between, which the runtime finds out itself, go too."""
    del proto.graph.value_info[:]
    for graph in (proto.graph, *proto.functions):
        for part in (graph, *graph.node):
            del part.metadata_props[:]
            part.doc_string = ""


def _name_axes(graph: Any, signature: Signature) -> None:
    """Open axes by the names of ``signature``; those of a cache are ``past`` and ``total``."""
    names: dict[str, str] = {}
    for value, spec in itertools.zip_longest(graph.input, signature.inputs):
        shape = ("",) * 4 if spec is None else spec.shape
        for axis, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            if axis.dim_param:
                axis.dim_param = names.setdefault(axis.dim_param, str(size) or "past")
    for value in graph.output:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = names.get(axis.dim_param, "total")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch.onnx says about packages that are not installed, and about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)
