"""Weights that several layers share: one set of integers, or parted knowingly."""

from __future__ import annotations

from torch import nn

from qaware.plan import Decision, Plan


def part_ties(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Give each layer that does not share its scheme with the others of its weight a copy of it, in place:
    what is rounded for one would else change the others.

    Returns:
        For each layer that was parted, from which one.
    """
    first: dict[int, list[tuple[str, object]]] = {}
    parted: dict[str, str] = {}
    for decision in plan.decisions:
        layer = model.get_submodule(decision.module)
        weight = getattr(layer, "weight", None)
        if not decision.parameter.endswith("weight") or not isinstance(weight, nn.Parameter):
            continue
        owners = first.setdefault(id(weight), [])
        scheme = _weight_scheme(plan, decision)
        if owners and all(scheme != other for _, other in owners):
            parted[decision.module] = owners[0][0]
            layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            weight = layer.weight
            owners = first.setdefault(id(weight), [])
        owners.append((decision.module, scheme))
    return parted


def find_ties(model: nn.Module, plan: Plan) -> dict[str, tuple[str, ...]]:
    """For the layer whose input decides, the others that share its weight: a linear layer before an
    embedding, whose input says nothing about rounding. Layers that share with none are left out."""
    shared: dict[int, list[str]] = {}
    for name in plan.quantized:
        layer = model.get_submodule(name)
        shared.setdefault(id(layer.weight), []).append(name)
    ties = {}
    for names in shared.values():
        leader, *others = sorted(names, key=lambda n: plan.quantized[n].type == "Embedding")
        if others:
            ties[leader] = tuple(others)
    return ties


def _weight_scheme(plan: Plan, decision: Decision) -> object:
    """None where it stays float."""
    scheme = plan.quantized[decision.module].scheme if decision.module in plan.quantized else None
    return None if scheme is None else scheme.weight
