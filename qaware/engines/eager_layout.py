"""Lay out a model for the eager engine: where its activations are rounded, and which layers stay float."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qaware.adapters import from_peft
from qaware.copying import deep_copy
from qaware.engines.dataflow import Dataflow, record
from qaware.engines.example import Example
from qaware.engines.fusion import find_layout, outside_stubs
from qaware.engines.operations import add_operation, add_scope
from qaware.errors import QawareError
from qaware.layout import Layout
from qaware.matching import CONVOLUTIONS
from qaware.plan import Decision, Plan

_STATIC_TYPES = ("Linear", *CONVOLUTIONS)


def lay_out(model: nn.Module, plan: Plan, example: Example) -> Plan:
    """The plan with the places where ``model`` rounds its activations.

    Args:
        model: float; runs once on ``example`` in evaluation mode.
        plan: made for ``model``. Layers that the example does not reach, or that the model's own stubs
            leave out, become float in the result, with the reason.
        example: real data or random numbers; only the path that it takes through the model counts.

    Raises:
        QawareError: a layer cannot hold its scheme, or the model does not run on the example.
    """
    plan.require_possible()
    if any(from_peft(module) for module in model.modules()):
        raise QawareError(
            "adapters: the eager engine does not train inside them; merge them first (merge_and_unload), or "
            "use a recipe without static activations"
        )
    for name, decision in plan.quantized.items():
        _refuse_scheme(name, decision)
    if not plan.needs_calibration:
        return dataclasses.replace(plan, layout=Layout("eager"))
    model = deep_copy(model).eval()  # a forward may count its calls or fill a cache
    example = example.to(next((p.device for p in model.parameters()), torch.device("cpu")))
    flow = _record(model, example)
    outside = outside_stubs(flow)
    shared = {name for name, module in model.named_modules() if _reads(flow, module)}
    reached = {call.name for call in flow.calls if call.module is not None}
    plan = dataclasses.replace(
        plan, decisions=tuple(_reachable(d, reached, outside, shared) for d in plan.decisions)
    )
    plan.require_possible()
    layout = find_layout(flow, {name for name, d in plan.quantized.items() if is_static(d)})
    plan = plan.with_layout(layout)
    return plan if _computes_the_same(model, plan, example) else _without_operations(plan)


def own_layers(plan: Plan) -> dict[str, Decision]:
    """The layers that are this engine's: with integer activations, and convolutions."""
    return {n: d for n, d in plan.quantized.items() if is_static(d) or d.type in CONVOLUTIONS}


def other_layers(plan: Plan) -> Plan:
    """The plan of the layers that the ``modules`` engine prepares."""
    own = own_layers(plan)
    return Plan(plan.recipe, tuple(d for d in plan.decisions if d.module not in own))


def is_static(decision: Decision) -> bool:
    return bool(decision.scheme and decision.scheme.is_static and decision.type in _STATIC_TYPES)


def layout_of(plan: Plan) -> Layout:
    if plan.layout is None:
        raise QawareError(
            f"recipe {plan.recipe.name!r}: the eager engine needs the layout of an example batch; "
            "call EagerEngine().lay_out(model, plan, example) first"
        )
    return plan.layout


def _refuse_scheme(name: str, decision: Decision) -> None:
    scheme = decision.scheme
    assert scheme is not None
    convolution = decision.type in CONVOLUTIONS
    if convolution and scheme.is_float:
        raise QawareError(f"{name}: bits: 16 is for Linear and Embedding, not {decision.type}; use bits: 8")
    if convolution and scheme.activation == "int8-dynamic":
        raise QawareError(
            f"{name}: activation: 'int8-dynamic' has no kernel for a {decision.type}; use int8-static or none"
        )
    if scheme.is_static and scheme.group_size:
        raise QawareError(
            f"{name}: group_size: {scheme.group_size} with int8-static activations has no kernel; use "
            "group_size: 0 (one scale per output channel), or activation: none"
        )


def _record(model: nn.Module, example: Example) -> Any:
    try:
        return record(model, lambda: example.run(model))
    except QawareError:
        raise
    except Exception as error:  # whatever the model's own forward makes of it
        shapes = ", ".join(str(tuple(t.shape)) for t in example.args if isinstance(t, Tensor))
        raise QawareError(
            f"{type(model).__name__}: cannot run on the example batch ({shapes}): "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _reads(flow: Dataflow, module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and id(weight) in flow.read


def _reachable(decision: Decision, reached: set[str], outside: set[str] | None, shared: set[str]) -> Decision:
    if not is_static(decision):
        return decision
    if decision.module not in reached:
        why = "stays float: the example batch does not reach it, so nothing is known of its activations"
    elif decision.module in shared:
        why = "stays float: the model's own code reads its weight, which it would find to be integers"
    elif outside is not None and decision.module in outside:
        why = "stays float: it is outside the model's own QuantStub and DeQuantStub"
    else:
        return decision
    return dataclasses.replace(decision, scheme=None, problem=None, reason=why)


def _computes_the_same(model: nn.Module, plan: Plan, example: Example) -> bool:
    """Whether watching its functions leaves what the model computes alone: a model that adds in place and
    goes on with the old tensor would not see the result."""
    if not layout_of(plan).operations:
        return True
    watched = deep_copy(model)
    for scope in layout_of(plan).scopes:
        add_scope(watched.get_submodule(scope))
    for site in layout_of(plan).operations:
        add_operation(watched.get_submodule(site.owner), site, nn.Identity())
    with torch.no_grad():
        pairs = zip(tree_leaves(example.run(model)), tree_leaves(example.run(watched)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


def _without_operations(plan: Plan) -> Plan:
    """The plan with additions and concatenations left in float; layers after them round their own input."""
    layout = layout_of(plan)
    names = {site.name for site in layout.operations}
    layers = tuple(
        dataclasses.replace(site, source=None) if site.source in names else site for site in layout.layers
    )
    return dataclasses.replace(plan, layout=Layout("eager", layers))
