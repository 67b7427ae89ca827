"""Make the graph of a model, and give the model its fake-quantizers."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qaware.engines.graph_fake_quant import GraphWeightFakeQuantizer
from qaware.engines.graph_fold import NORM, product_and_norm, train_norms
from qaware.engines.graph_module import CHILD, Program, float_class, graph_data
from qaware.engines.graph_normal import is_product
from qaware.engines.graph_quantizers import insert
from qaware.engines.graph_trace import follow_modes, owner, trace
from qaware.layout import LayerSite
from qaware.plan import Plan

STRUCTURE = "qaware_structure"
"""Key in a graph module's ``meta``: the structure of its results."""
ACTIVATIONS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default, torch.ops.aten.hardtanh.default)
"""Functions that the runtimes fuse into the layer before them."""
WEIGHT, INPUT, OUTPUT = "weight_fake_quantizer", "activation_fake_quantizer", "output_fake_quantizer"
Kind = TypeVar("Kind", bound=nn.Module)


def make_graph(model: nn.Module, plan: Plan) -> GraphModule:
    """The graph of ``model`` with fake-quantizers that are named, but not in ``model`` yet."""
    data = graph_data(plan)
    cls, devices = type(model), list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    model.__class__ = float_class(model)
    try:
        # Exports draw random numbers; the training must not notice.
        with torch.random.fork_rng(devices):
            traced = trace(model, data["inputs"], data["training"])
            structure = traced._out_spec
            prepared = insert(traced, plan, data["target"])
    finally:
        model.__class__ = cls
    train_norms(prepared, model)
    follow_modes(prepared)
    prepared.meta[STRUCTURE] = structure
    return prepared


def remake(model: nn.Module, plan: Plan) -> Program:
    """The graph of a prepared model that came from another process."""
    prepared = make_graph(model, plan)
    adopt(model, prepared)
    return as_program(plan, prepared)


def as_program(plan: Plan, prepared: GraphModule) -> Program:
    meta = dict(prepared.meta)
    return Program(plan, prepared.graph, meta.pop(STRUCTURE), meta, remake)


def rounded_layers(module: GraphModule) -> set[str]:
    """The layers whose weight has a fake-quantizer wherever they are called."""
    calls = [node for node in module.graph.nodes if is_layer(node)]
    left = {owner(node) for node in calls if weight_quantizer(module, node) is None}
    return {owner(node) for node in calls} - left


def layer_sites(module: GraphModule) -> tuple[LayerSite, ...]:
    """The rounded layers, with the batch norms that are folded into them."""
    sites: dict[str, LayerSite] = {}
    for node in module.graph.nodes:
        if weight_quantizer(module, node) is not None:
            norm = node.meta.get(NORM, {}).get("owner")
            relu = len(node.users) == 1 and next(iter(node.users)).target in ACTIVATIONS
            sites.setdefault(owner(node), LayerSite(owner(node), norm, relu))
    left = sites.keys() - rounded_layers(module)
    return tuple(site for name, site in sites.items() if name not in left)


def weight_quantizer(module: nn.Module, node: Node) -> GraphWeightFakeQuantizer | None:
    if not is_layer(node):
        return None
    return called(module, node.args[1], GraphWeightFakeQuantizer)


def called(module: nn.Module, node: Any, kind: type[Kind]) -> Kind | None:
    """The submodule that ``node`` calls, if it is one of ``kind``."""
    if not (isinstance(node, Node) and node.op == "call_module"):
        return None
    called = module.get_submodule(str(node.target))
    return called if isinstance(called, kind) else None


def adopt(model: nn.Module, prepared: GraphModule) -> None:
    """Give ``model`` the fake-quantizers and constants of its graph, unless it has them already."""
    device = next(model.parameters()).device
    if CHILD not in model._modules:
        model.add_module(CHILD, nn.Module())
    names = _Names(rounded_layers(prepared))
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            quantizer = prepared.get_submodule(node.target)
            node.target = names.of(node, quantizer)
            prefix, _, key = node.target.rpartition(".")
            parent = model.get_submodule(prefix)
            if key not in parent._modules:
                parent.add_module(key, quantizer.to(device).train(parent.training))
        elif node.op == "get_attr" and not _has(model, node.target):
            value = attrgetter(node.target)(prepared)
            key = node.target.replace(".", "_")
            node.target = f"{CHILD}.{key}"
            if isinstance(value, nn.Module):
                model.get_submodule(CHILD).add_module(key, value)
            else:
                model.get_submodule(CHILD).register_buffer(key, value.detach().to(device), persistent=False)


class _Names:
    """Fake-quantizers are named as the other engines name theirs: after the layer whose weight, input or
    output they round. The others are numbered by operation."""

    def __init__(self, layers: set[str]) -> None:
        self.layers = layers
        self.names: dict[int, str] = {}
        self.taken: Counter[str] = Counter()

    def of(self, node: Node, quantizer: nn.Module) -> str:
        """The name of what ``node`` calls; one that is shared has the first."""
        if id(quantizer) not in self.names:
            self.names[id(quantizer)] = self._free(node, quantizer)
        return self.names[id(quantizer)]

    def _free(self, node: Node, quantizer: nn.Module) -> str:
        name = self._layer(node, quantizer)
        if name is None or self.taken[name]:
            kind = str(node.args[0].name).rstrip("_0123456789")  # type: ignore[union-attr]
            name = f"{CHILD}.{kind}_{self.taken[kind]}_fake_quantizer"
            self.taken[kind] += 1
        self.taken[name] += 1
        return name

    def _layer(self, node: Node, quantizer: nn.Module) -> str | None:
        user = next(iter(node.users), None)
        if isinstance(quantizer, GraphWeightFakeQuantizer):
            return f"{owner(user)}.{WEIGHT}" if user is not None else None
        before = producer(node)
        if before is not None and owner(before) in self.layers:
            return f"{owner(before)}.{OUTPUT}"
        enters = [user for user in node.users if is_layer(user) and owner(user) in self.layers]
        return f"{owner(enters[0])}.{INPUT}" if enters else None


def is_layer(node: Any) -> bool:
    """Whether ``node`` is a layer, with a batch norm or without."""
    return is_product(node) or (isinstance(node, Node) and node.target is product_and_norm)


def producer(node: Node) -> Node | None:
    """The layer whose result, perhaps behind an activation function, a fake-quantizer's ``node`` rounds."""
    before = node.args[0]
    if isinstance(before, Node) and before.target in ACTIVATIONS:
        before = before.args[0]
    return before if isinstance(before, Node) and is_layer(before) else None


def _has(model: nn.Module, name: str) -> bool:
    prefix, _, key = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(prefix), key)
    except AttributeError:
        return False
