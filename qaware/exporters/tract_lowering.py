"""From a converted model to a tract NNEF archive that holds the engine's own integers.

torch_to_nnef traces the model with plain float weights and builds the graph. Before it is written,
the variable of each quantized weight is replaced by what ships: Q4_0 blocks, which tract multiplies
packed, or int8 and float16 with the operations that bring them back to float32. Nothing is rounded
here: a number that the format cannot hold is an error.

Imported by ``tract.py`` only while a file is written, because it imports torch_to_nnef.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nnef_tools.model import Graph
from torch import Tensor, nn
from torch_to_nnef import export_model_to_nnef
from torch_to_nnef.inference_target.tract import TractNNEF

from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.engines.static_integer import IntegerLayer
from qaware.exporters.generation import CacheSpec, GrowingStep
from qaware.exporters.signature import Signature, TensorSpec
from qaware.exporters.tract import PLAIN
from qaware.exporters.tract_archive import pack
from qaware.exporters.tract_int8 import float_reason, multiply_floats
from qaware.exporters.tract_rounding import drop_round_trips, fence_concatenations, spell_out_round_trips
from qaware.exporters.tract_storage import Stored, store_weights
from qaware.exporters.tract_tracing import no_download, traceable

_TRACE_SIZES = (3, 5, 7, 11, 13)
"""Of dynamic axes while tracing: a size of 1 would be traced as a broadcast, equal ones as one axis."""


def write_nnef(
    quantized: QuantizedModel,
    example: Sequence[Tensor],
    signature: Signature,
    path: Path,
    cache: CacheSpec | None = None,
    properties: Mapping[str, str] | None = None,
    convolutions: str = "float",
) -> dict[str, str]:
    """Write the archive. ``quantized`` becomes a float model on the way, except for its integer products.

    Args:
        quantized: changed.
        example: of ``signature``.
        signature: the inputs, of the model itself.
        path: of the archive.
        cache: makes the archive one step of a language model: tokens and what was kept of those before them
            in, logits and what is to be kept out.
        properties: kept in the archive.
        convolutions: ``integer`` or ``float``, of integer layers with a scale for each channel.

    Returns:
        Layers with static activations that tract multiplies in float, and why.

    Raises:
        QawareError: a scale is not exact in float16, or a weight is not in the graph as it is.
    """
    static = _static_layers(quantized)
    floating = {name: why for name, layer in static if (why := float_reason(layer, convolutions))}
    layers = _use_float_weights(quantized, floating)
    module = _separate(quantized.module.float().cpu(), set())
    outputs = ["qaware_output"]
    if cache is None:
        model: nn.Module = signature.wrap(module).eval()
    else:
        model = GrowingStep(module).eval()
        outputs += [f"present_{i}" for i in range(len(cache.shapes))]
        # One token in the past: what is traced is another number, see below.
        example, signature = (*example, *cache.empty(1)), with_past(signature, cache)
    names = [re.sub(r"\W", "_", spec.name) for spec in signature.inputs]
    sizes = _trace_sizes(signature)
    axes = [{i: d for i, d in enumerate(spec.shape) if d in sizes} for spec in signature.inputs]
    target = _Target(_by_parameter(model, layers), dict(zip(names, axes, strict=True)), properties or {})
    with tempfile.TemporaryDirectory(prefix=".qaware-", dir=path.parent) as folder, traceable():
        exported = export_model_to_nnef(
            model,
            _resize(example, signature, sizes),
            Path(folder) / "model.nnef",
            target,
            input_names=names,
            output_names=outputs,
            compression_level=None,
            log_level=logging.ERROR,
            custom_extensions=_bounds(signature, sizes),
        )
        for name, content in target.files.items():
            (exported / name).write_bytes(content)
        pack(exported, path)
    return floating


def with_past(signature: Signature, cache: CacheSpec) -> Signature:
    """Of the archive of a language model: token ids (1, S), then keys and values (1, heads, P, dim)."""
    (ids,) = signature.inputs
    past = [TensorSpec(f"past_{i}", "float32", (1, h, "P", d)) for i, (h, d) in enumerate(cache.shapes)]
    tokens = dataclasses.replace(ids, shape=(1, "S"))
    return Signature((tokens, *past), {"S": (1, signature.longest), "P": (0, cache.length)})


class _Target(TractNNEF):  # type: ignore[misc]
    """tract as torch_to_nnef knows it, which stores weights as they are and downloads nothing."""

    def __init__(
        self, weights: Mapping[str, Stored], axes: dict[str, Any], properties: Mapping[str, str]
    ) -> None:
        with no_download():
            super().__init__(
                self.latest_version(),
                check_io=False,
                dynamic_axes=axes,
                # Who exported it, on which machine and with which command is nobody's business.
                dump_identity_properties=False,
                specific_properties={"export_cmd": "qaware", "export_date": "", **properties},
                # tract's own attention is slower: 1.2 times for 128 tokens, 1.3 times for one after 128.
                reify_sdpa_operator=False,
            )
        self.weights = weights
        self.files: dict[str, bytes] = {}

    def post_trace(self, nnef_graph: Graph, active_custom_extensions: list[str]) -> None:
        """Called by torch_to_nnef between building the graph and writing it."""
        super().post_trace(nnef_graph, active_custom_extensions)
        drop_round_trips(nnef_graph)
        spell_out_round_trips(nnef_graph)
        fence_concatenations(nnef_graph)
        self.files = store_weights(nnef_graph, self.weights)


def _static_layers(quantized: QuantizedModel) -> list[tuple[str, IntegerLayer]]:
    static = {name for name, d in quantized.plan.quantized.items() if d.scheme and d.scheme.is_static}
    modules = quantized.module.named_modules()
    return [(name, m) for name, m in modules if name in static and isinstance(m, IntegerLayer)]


def _use_float_weights(
    quantized: QuantizedModel, floating: Collection[str] = ()
) -> dict[int, tuple[str, QuantizedWeight]]:
    """Turn every quantized layer that tract computes in float into a plain one with its dequantized weight;
    ties stay ties.

    Returns:
        Layer name and integers, by the id of the new parameter.
    """
    static = dict(_static_layers(quantized))
    # Of them nobody has asked whether they fill the blocks of Q4_0.
    wide = {name for name, d in quantized.plan.quantized.items() if d.scheme and d.scheme.is_static}
    parameters: dict[int, nn.Parameter] = {}
    layers: dict[int, tuple[str, QuantizedWeight]] = {}
    for name, weight in quantized.weights.items():
        layer: Any = quantized.module.get_submodule(name)
        if name not in static:
            layer.__class__ = PLAIN[quantized.plan.layer(name).type]
        elif name not in floating:
            continue
        else:
            multiply_floats(layer)
        if id(weight) not in parameters:
            here = _on_cpu(weight)
            if name in wide:
                here = dataclasses.replace(here, scheme=dataclasses.replace(here.scheme, bits=8))
            value = here.dequantize().view(layer.weight.shape)
            parameters[id(weight)] = nn.Parameter(value, requires_grad=False)
            layers[id(parameters[id(weight)])] = name, here
        layer.weight = parameters[id(weight)]
    return layers


def _on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    scale = None if weight.scale is None else weight.scale.cpu()
    zero_point = None if weight.zero_point is None else weight.zero_point.cpu()
    return QuantizedWeight(weight.data.cpu(), scale, zero_point, weight.scheme)


def _separate(module: nn.Module, seen: set[int]) -> nn.Module:
    """Give a module that is registered twice two objects with the same parameters: torch_to_nnef
    looks parameters up by each of their names and fails on the second."""
    seen.add(id(module))
    for name, child in module._modules.items():
        if child is None:
            continue
        if id(child) in seen:
            child = copy.copy(child)
            for held in ("_parameters", "_buffers", "_modules"):
                child.__dict__[held] = dict(child.__dict__[held])
        module._modules[name] = _separate(child, seen)
    return module


def _by_parameter(model: nn.Module, layers: Mapping[int, tuple[str, QuantizedWeight]]) -> dict[str, Stored]:
    """What to store by every name of its parameter, under the first: of tied names the graph has any."""
    first: dict[int, Stored] = {}
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in layers:
            layer, weight = layers[id(parameter)]
            weights[name] = first.setdefault(id(parameter), Stored(layer, name, weight))
    return weights


def _trace_sizes(signature: Signature) -> dict[str, int]:
    """A size within bounds for each axis that is really dynamic."""
    free = [(symbol, *bounds) for symbol, bounds in signature.symbols.items() if bounds[0] < bounds[1]]
    wanted = itertools.cycle(_TRACE_SIZES)
    return {
        symbol: min(max(size, low), high) for (symbol, low, high), size in zip(free, wanted, strict=False)
    }


def _resize(example: Sequence[Tensor], signature: Signature, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """The example with its dynamic axes cut or repeated to ``sizes``, so that its values stay legal."""
    resized = []
    for spec, tensor in zip(signature.inputs, example, strict=True):
        for axis, symbol in enumerate(spec.shape):
            if isinstance(symbol, str) and symbol in sizes:
                index = torch.arange(sizes[symbol], device=tensor.device) % tensor.shape[axis]
                tensor = tensor.index_select(axis, index)
        resized.append(tensor.cpu())
    return tuple(resized)


def _bounds(signature: Signature, sizes: Mapping[str, int]) -> list[str]:
    """Both bounds of each symbol; tract needs the two to accept a table that is sliced by length."""
    return [
        f"tract_assert {symbol}{sign}{bound}"
        for symbol in sizes
        for sign, bound in zip((">=", "<="), signature.symbols[symbol], strict=True)
    ]
