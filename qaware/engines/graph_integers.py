"""From a prepared graph to one of integers, with the integers where the float weights were."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.utils import prune
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.graph_build import INPUT, OUTPUT, called, is_layer, producer, weight_quantizer
from qaware.engines.graph_fake_quant import GraphActivationFakeQuantizer, GraphWeightFakeQuantizer
from qaware.engines.graph_fold import NORM, fix_norms, fold_bias, fold_weight, hide_norms, show_norms
from qaware.engines.graph_module import Program, become_graph, program
from qaware.engines.graph_trace import fix_modes, owner, read
from qaware.errors import QawareError
from qaware.plan import Plan

_OPS = torch.ops.quantized_decomposed


def to_integers(
    model: nn.Module, plan: Plan, weights: Mapping[str, QuantizedWeight] | None = None
) -> QuantizedModel:
    """Convert a prepared model in place.

    Args:
        model: prepared, in evaluation mode.
        plan: of the result.
        weights: by layer, integers that were kept; None to round the model's own weights.

    Raises:
        QawareError: a range was never observed.
    """
    held = program(model)
    result = QuantizedModel(model, plan, weights={})
    assert held.graph is not None
    module = GraphModule(model, held.graph)
    fix_norms(module)
    fix_modes(module)
    norms = {node.meta[NORM]["owner"] for node in module.graph.nodes if NORM in node.meta}
    _record_ranges(module, model, result)
    _store_layers(module, model, result, weights or {})
    module = GraphModule(model, module.graph)  # of the integers now
    module.meta.update(held.meta)
    hide_norms(module)
    _point_annotations(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = convert_pt2e(module)
    show_norms(converted)
    become_graph(model, Program(plan, converted.graph, held.structure, {}, None))
    _discard(model, converted, norms)
    return result


def _point_annotations(module: GraphModule) -> None:
    """Annotations name the nodes that enter; in a copy of the graph these are still the original's."""
    nodes = {node.name: node for node in module.graph.nodes}
    for node in module.graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is not None:
            entering = annotation.input_qspec_map.items()
            here = {nodes[n.name]: spec for n, spec in entering if n.name in nodes}
            node.meta[Q_ANNOTATION_KEY] = dataclasses.replace(annotation, input_qspec_map=here)


def _record_ranges(module: GraphModule, model: nn.Module, result: QuantizedModel) -> None:
    """What enters and leaves the layers, and what leaves the operations between them."""
    for node in module.graph.nodes:
        quantizer = called(model, node, GraphActivationFakeQuantizer)
        if quantizer is None:
            continue
        name = str(node.target)
        try:
            grid = quantizer.range
        except QawareError as error:
            raise QawareError(f"{_site(name)}: {error}") from error
        if not name.endswith(f".{INPUT}"):
            result.outputs[_site(name)] = grid
        before = producer(node)
        if before is not None and owner(before) in result.plan.quantized:
            result.outputs[owner(before)] = grid
        for user in node.users:
            if is_layer(user) and user.args[0] is node and owner(user) in result.plan.quantized:
                result.activations[owner(user)] = grid


def fix_ranges(
    model: nn.Module, activations: Mapping[str, ActivationRange], outputs: Mapping[str, ActivationRange]
) -> None:
    """Give the fake-quantizers of a prepared model the ranges of a converted one.

    Raises:
        QawareError: one has none.
    """
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, GraphActivationFakeQuantizer):
            ranges = activations if name.endswith(f".{INPUT}") else outputs
            if _site(name) not in ranges:
                raise QawareError(f"{_site(name)}: has no range; it was made by another version of PyTorch")
            quantizer.fixed = ranges[_site(name)]


def _site(name: str) -> str:
    """The layer or operation that a fake-quantizer is named after."""
    prefix, _, key = name.rpartition(".")
    return prefix if key in (INPUT, OUTPUT) else name.removesuffix("_fake_quantizer")


def _store_layers(
    module: GraphModule, model: nn.Module, result: QuantizedModel, kept: Mapping[str, QuantizedWeight]
) -> None:
    """Integers and folded biases into the layers of ``model``, and nodes that read them into the graph."""
    found = [(node, weight_quantizer(model, node)) for node in module.graph.nodes]
    layers = [(node, quantizer) for node, quantizer in found if quantizer is not None]
    # All values before the first is written: a layer that is called twice is read twice.
    values = [(_value(module, node.args[1].args[0]), _bias(module, node)) for node, _ in layers]
    for (node, quantizer), (weight, bias) in zip(layers, values, strict=True):
        name = owner(node)
        if name not in result.weights:
            result.weights[name] = kept.get(name) or quantizer.quantize(weight)
            _store(model.get_submodule(name), result.weights[name], weight.shape, bias)
        with module.graph.inserting_before(node):
            rest = (read(module, f"{name}.bias"), *node.args[3:]) if bias is not None else node.args[2:]
            node.args = (node.args[0], _read(module, name, quantizer, result.weights[name]), *rest)
    for node in reversed(module.graph.nodes):  # folds, and the float tensors that they read
        unused = not node.users and node.op in ("get_attr", "call_module")
        if unused or (not node.users and node.target in (fold_weight, fold_bias)):
            module.graph.erase_node(node)


def _value(module: GraphModule, node: Node) -> Tensor:
    """The value of a node that depends on no input."""
    if node.op == "get_attr":
        value = attrgetter(str(node.target))(module)
    else:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _value(module, n))
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    return value.detach() if isinstance(value, Tensor) else value


def _bias(module: GraphModule, node: Node) -> Tensor | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return _value(module, bias) if isinstance(bias, Node) else None


def _store(layer: Any, weight: QuantizedWeight, shape: torch.Size, bias: Tensor | None) -> None:
    if "weight_mask" in layer._buffers:  # pruned and not made permanent
        prune.remove(layer, "weight")
    assert weight.scale is not None
    layer.weight = nn.Parameter(weight.data.view(shape), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.float().clone(), requires_grad=False)
    scale = weight.scale.flatten()
    layer.register_buffer("weight_scale", scale)
    layer.register_buffer(
        "weight_zero_point", torch.zeros(len(scale), dtype=torch.int64, device=scale.device)
    )


def _read(
    module: GraphModule, name: str, quantizer: GraphWeightFakeQuantizer, weight: QuantizedWeight
) -> Node:
    """A node with the weight's float values."""
    integers = read(module, f"{name}.weight")
    bounds = (*quantizer.integers, torch.int8)
    assert weight.scale is not None
    if quantizer.scheme.per_tensor:
        arguments = (integers, float(weight.scale[0, 0]), 0, *bounds)
        return module.graph.call_function(_OPS.dequantize_per_tensor.default, arguments)
    scale, zero_point = (read(module, f"{name}.weight_{key}") for key in ("scale", "zero_point"))
    return module.graph.call_function(
        _OPS.dequantize_per_channel.default, (integers, scale, zero_point, 0, *bounds)
    )


def _discard(model: nn.Module, converted: GraphModule, norms: set[str]) -> None:
    """Fake-quantizers and the tensors of folded batch norms, which nothing reads any more."""
    read = {str(node.target) for node in converted.graph.nodes if node.op == "get_attr"}
    for parent in list(model.modules()):
        for key in [key for key in parent._modules if key.endswith("_fake_quantizer")]:
            del parent._modules[key]
    for name in norms:
        if not any(target.startswith(f"{name}.") for target in read):
            norm = model.get_submodule(name)
            norm.__class__ = nn.Identity
            norm._parameters.clear()
            norm._buffers.clear()
