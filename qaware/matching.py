"""Match a recipe against a model: which parameter gets which scheme, and why the others stay float."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qaware.adapters import ADAPTER, Place, find_places, from_peft
from qaware.errors import QawareError
from qaware.plan import Decision, Plan, qualified, unfit
from qaware.recipe import Recipe, Rule, _suggest
from qaware.roles import find_roles
from qaware.scheme import Scheme
from qaware.sharded import plain_class

if TYPE_CHECKING:
    from torch import nn

QUANTIZABLE = ("Linear", "Embedding", "Conv1d", "Conv2d")
CONVOLUTIONS = ("Conv1d", "Conv2d")


def make_plan(recipe: Recipe, model: nn.Module) -> Plan:
    """Match ``recipe`` against a float ``model``.

    Raises:
        QawareError: a ``name`` pattern that matches no module (the nearest names are suggested), or a
            lazy layer that has no shape yet.
    """
    roles = find_roles(model)
    # A model that is prepared already may have scales that it learns.
    modules = {name: m for name, m in model.named_modules() if "_fake_quantizer." not in name}
    places = find_places(model)
    _refuse_dead_patterns(recipe, modules, {place.name for place in places.values()})
    first_owner: dict[int, str] = {}
    decisions = []
    for module_name, module in modules.items():
        place = places.get(module_name, Place(module_name))
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = qualified(module_name, parameter_name)
            _refuse_lazy(name, parameter)
            # Merging an adapter makes a weight of its own, and what is dropped ships nothing.
            alone = place.merged or place.dropped is not None
            tied = name if alone else first_owner.setdefault(id(parameter), name)
            undecided = Decision(
                parameter=name,
                module=module_name,
                type=_type_name(module) if place.obstacle is None else _wanted_type(module),
                shape=tuple(parameter.shape),
                role=roles.get(module_name),
                scheme=None,
                reason="",
                tied_to=None if tied == name else tied,
                alias=None if place.name == module_name else place.name,
                dropped=place.dropped or (ADAPTER if from_peft(module) else None),
                obstacle=place.obstacle,
            )
            decisions.append(undecided)
    _refuse_dead_blocks(recipe, _block_counts(decisions))
    return Plan(recipe, _decided(recipe, decisions))


def rematch(plan: Plan, recipe: Recipe) -> Plan:
    """The parameters of ``plan`` under another recipe."""
    return Plan(recipe, _decided(recipe, plan.decisions))


def _decided(recipe: Recipe, decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    counts = _block_counts(decisions)
    return tuple(_decide(recipe, decision, counts) for decision in decisions)


def _decide(recipe: Recipe, decision: Decision, counts: Mapping[str, int]) -> Decision:
    scheme, reason = _scheme_for(recipe, decision, counts)
    problem = None if scheme is None else decision.obstacle or unfit(scheme, decision.width)
    return dataclasses.replace(decision, scheme=scheme, reason=reason, problem=problem)


def _scheme_for(recipe: Recipe, decision: Decision, counts: Mapping[str, int]) -> tuple[Scheme | None, str]:
    kind, parameter = decision.type, decision.parameter.rpartition(".")[2]
    if decision.dropped is not None:
        return None, decision.dropped
    rule = next((r for r in recipe.rules if _matches(r, decision, counts)), None)
    if rule is None:
        return None, f"no rule matches (type {kind})"
    if rule.scheme is None:
        return None, f"kept float by rule {rule.label}"
    if kind not in QUANTIZABLE:
        return None, f"type {kind} is not supported (only {', '.join(QUANTIZABLE)}, not their subclasses)"
    if parameter not in ("weight", "weight_orig"):  # the second where torch.nn.utils.prune masks it
        return None, f"a {parameter} stays float"
    if kind == "Embedding" and rule.scheme.activation != "none":
        # An embedding's input is a token id, so only the weight part of the scheme applies.
        return rule.scheme.weight, f"rule {rule.label} (weight only)"
    return rule.scheme, f"rule {rule.label}"


def _matches(rule: Rule, decision: Decision, counts: Mapping[str, int]) -> bool:
    names = {decision.module, decision.module if decision.alias is None else decision.alias}
    return (
        (rule.role is None or rule.role == decision.role)
        and (rule.type is None or rule.type == decision.type)
        and (rule.name is None or any(fnmatch.fnmatchcase(name, rule.name) for name in names))
        and (rule.blocks is None or _in_blocks(rule.blocks, decision.module, counts))
    )


def _block(module: str) -> tuple[str, int] | None:
    """The list that a module's block is in and its number there: the first number in its name."""
    found = re.search(r"(?:^|(?<=\.))\d+(?=\.|$)", module)
    return None if found is None else (module[: found.start()], int(found.group()))


def _block_counts(decisions: Iterable[Decision]) -> dict[str, int]:
    """How many blocks each list has, by its name."""
    counts: dict[str, int] = {}
    for place in filter(None, (_block(decision.module) for decision in decisions)):
        counts[place[0]] = max(counts.get(place[0], 0), place[1] + 1)
    return counts


def _in_blocks(blocks: tuple[int, ...], module: str, counts: Mapping[str, int]) -> bool:
    place = _block(module)
    return place is not None and (place[1] in blocks or place[1] - counts[place[0]] in blocks)


def _refuse_dead_blocks(recipe: Recipe, counts: Mapping[str, int]) -> None:
    most = max(counts.values(), default=0)
    for rule in recipe.rules:
        dead = [block for block in rule.blocks or () if not -most <= block < most]
        if dead:
            has = f"{most} numbered blocks" if most else "no numbered blocks, such as layers.0"
            raise QawareError(f"blocks: {dead[0]} is none of this model, which has {has}; give others")


def _type_name(module: nn.Module) -> str:
    """``Linear`` for exactly torch.nn.Linear; a subclass, which may compute something else, in full."""
    if "weight_orig" in module._parameters and "weight_mask" not in module._buffers:
        return f"{type(module).__name__} under a reparametrization"  # such as spectral_norm, unlike pruning
    if hasattr(module, "weight_fake_quantizer"):  # prepared already, so it was one of these
        return _wanted_type(module)
    cls = plain_class(module)
    return cls.__name__ if cls.__module__.startswith("torch.nn.") else f"{cls.__module__}.{cls.__name__}"


def _wanted_type(module: nn.Module) -> str:
    """What a layer that its adapter or another quantizer made its own was meant to be."""
    from torch import nn

    kinds = [kind for kind in QUANTIZABLE if isinstance(module, getattr(nn, kind))]
    return kinds[0] if kinds else _type_name(module)


def _refuse_lazy(name: str, parameter: nn.Parameter) -> None:
    from torch.nn.parameter import is_lazy

    if is_lazy(parameter):
        raise QawareError(f"{name}: has no shape yet; run one batch through the model before quantizing it")


def _refuse_dead_patterns(recipe: Recipe, modules: dict[str, nn.Module], aliases: set[str]) -> None:
    for rule in recipe.rules:
        if rule.name is not None and not any(fnmatch.fnmatchcase(n, rule.name) for n in (*modules, *aliases)):
            names = [n for n, m in modules.items() if n and any(True for _ in m.parameters(recurse=False))]
            raise QawareError(f"name: {rule.name!r} matches no module{_suggest(rule.name, names[:40])}")
