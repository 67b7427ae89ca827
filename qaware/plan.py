"""What a recipe does to a model: the fate of every parameter, with the reason."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qaware.adapters import ADAPTER, Place, find_places, from_peft
from qaware.errors import QawareError
from qaware.recipe import Recipe, Rule, _suggest
from qaware.roles import find_roles
from qaware.scheme import Scheme
from qaware.sharded import plain_class

if TYPE_CHECKING:
    from torch import nn

QUANTIZABLE = ("Linear", "Embedding")


@dataclass(frozen=True)
class Decision:
    """The fate of one parameter."""

    parameter: str
    """Fully qualified name, e.g. ``model.layers.0.mlp.down_proj.weight``."""
    module: str
    """Fully qualified name of the module that holds it."""
    type: str
    """Class name of that module."""
    shape: tuple[int, ...]
    role: str | None
    scheme: Scheme | None
    """None: stays float."""
    reason: str
    """The rule that matched, or why the parameter stays float."""
    problem: str | None = None
    """Set when a rule asks for what this layer cannot hold, e.g. a group size that does not divide."""
    tied_to: str | None = None
    """The first parameter that is the same tensor."""
    alias: str | None = None
    """The module's name once adapters are merged, by which rules know it too; None: the same."""
    dropped: str | None = None
    """Why the parameter does not ship by itself: it belongs to an adapter; None for all others."""
    obstacle: str | None = None
    """Why an adapter keeps the weight from being quantized, under any scheme."""

    @property
    def width(self) -> int:
        """Weights in a row: in_features of a Linear, embedding_dim of an Embedding."""
        return self.shape[-1] if self.shape else 1

    @property
    def numel(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Plan:
    """A recipe matched against a model."""

    recipe: Recipe
    decisions: tuple[Decision, ...]

    @property
    def quantized(self) -> dict[str, Decision]:
        """Decisions that have a scheme and no problem, by module name."""
        return {d.module: d for d in self.decisions if d.scheme is not None and d.problem is None}

    @property
    def skipped(self) -> list[Decision]:
        """Parameters that stay float."""
        return [d for d in self.decisions if d.scheme is None]

    @property
    def problems(self) -> list[Decision]:
        """Layers that cannot hold the scheme that a rule asks for."""
        return [d for d in self.decisions if d.problem is not None]

    @property
    def needs_calibration(self) -> bool:
        """Whether a scheme has a static activation range."""
        return any(d.scheme and d.scheme.activation == "int8-static" for d in self.quantized.values())

    def layer(self, name: str) -> Decision:
        """The decision on the weight of module ``name``."""
        return self.quantized[name]

    def under(self, recipe: Recipe) -> Plan:
        """The same parameters under another recipe."""
        return Plan(recipe, tuple(_decide(recipe, decision) for decision in self.decisions))

    def renamed(self, names: Mapping[str, str]) -> Plan:
        """The decisions on the modules in ``names``, under their new names."""
        kept = [d for d in self.decisions if d.module in names]
        parameters = {d.parameter: _qualified(names[d.module], d.parameter) for d in kept}
        return Plan(
            self.recipe,
            tuple(
                dataclasses.replace(
                    d,
                    parameter=parameters[d.parameter],
                    module=names[d.module],
                    tied_to=parameters.get(d.tied_to or ""),
                    alias=None,
                )
                for d in kept
            ),
        )

    def summary(self) -> str:
        """One line: how many layers and how much of the model are quantized; tied ones count once, adapters
        apart."""
        done = sum({d.tied_to or d.parameter: d.numel for d in self.quantized.values()}.values())
        total = sum(d.numel for d in self.decisions if d.tied_to is None and d.dropped is None)
        return (
            f"{self.recipe.name}: {len(self.quantized)} layers, {done:,} of {total:,} parameters "
            f"({done / max(total, 1):.1%}) quantized{self._left_float()}"
        )

    def _left_float(self) -> str:
        """The types that hold most of what stays float, so that a layer left out is not overlooked."""
        held: Counter[str] = Counter()
        for decision in self.skipped:
            if decision.tied_to is None and decision.dropped is None:
                held[decision.type.rpartition(".")[2]] += decision.numel
        text = ", ".join(f"{kind} {count:,}" for kind, count in held.most_common(3))
        adapters = sum(d.numel for d in self.decisions if d.dropped is not None)
        merged = f"; adapters: {adapters:,}, gone at convert" if adapters else ""
        return (f"; float: {text}" if text else "") + merged

    def require_possible(self) -> None:
        """Raise for the layers that cannot hold their scheme, or when nothing is quantized.

        Raises:
            QawareError: names every such layer, the value, and the nearest legal choice.
        """
        if self.problems:
            lines = "; ".join(f"{d.module}: {d.problem}{_group_choice(d)}" for d in self.problems)
            raise QawareError(f"recipe {self.recipe.name!r}: {lines}")
        if not self.quantized:
            raise QawareError(
                f"recipe {self.recipe.name!r} quantizes nothing in this model (rules: "
                f"{', '.join(r.label for r in self.recipe.rules)}); add a rule that matches its layers"
            )


def make_plan(recipe: Recipe, model: nn.Module) -> Plan:
    """Match ``recipe`` against a float ``model``.

    Raises:
        QawareError: a ``name`` pattern that matches no module (the nearest names are suggested), or a
            lazy layer that has no shape yet.
    """
    roles = find_roles(model)
    modules = dict(model.named_modules())
    places = find_places(model)
    _refuse_dead_patterns(recipe, modules, {place.name for place in places.values()})
    first_owner: dict[int, str] = {}
    decisions = []
    for module_name, module in modules.items():
        place = places.get(module_name, Place(module_name))
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = _qualified(module_name, parameter_name)
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
            decisions.append(_decide(recipe, undecided))
    return Plan(recipe, tuple(decisions))


def indivisible(scheme: Scheme | None, width: int) -> str | None:
    """Why a row of ``width`` weights cannot be cut into the scheme's groups, or None."""
    if scheme is None or not scheme.group_size or width % scheme.group_size == 0:
        return None
    return f"group_size {scheme.group_size} does not divide its {width} input weights"


def nearest_groups(width: int, wanted: int) -> list[int]:
    """Group sizes (2 or more) that divide ``width``, nearest to ``wanted`` (by ratio) first."""
    divisors = [g for g in range(2, width + 1) if width % g == 0]
    return sorted(divisors, key=lambda g: (max(g, wanted) / min(g, wanted), g))


def _group_choice(decision: Decision) -> str:
    if decision.obstacle is not None:
        return ""
    assert decision.scheme is not None
    near = [str(g) for g in nearest_groups(decision.width, decision.scheme.group_size)[:3]]
    groups = f"{' or '.join(near)}, or " if near else ""
    return f"; nearest legal group_size: {groups}0 (one scale per output channel)"


def _decide(recipe: Recipe, decision: Decision) -> Decision:
    scheme, reason = _scheme_for(recipe, decision)
    problem = None if scheme is None else decision.obstacle or indivisible(scheme, decision.width)
    return dataclasses.replace(decision, scheme=scheme, reason=reason, problem=problem)


def _scheme_for(recipe: Recipe, decision: Decision) -> tuple[Scheme | None, str]:
    kind, parameter = decision.type, decision.parameter.rpartition(".")[2]
    if decision.dropped is not None:
        return None, decision.dropped
    rule = next((r for r in recipe.rules if _matches(r, decision)), None)
    if rule is None:
        return None, f"no rule matches (type {kind})"
    if rule.scheme is None:
        return None, f"kept float by rule {rule.label}"
    if kind not in QUANTIZABLE:
        return None, f"type {kind} is not supported (only {' and '.join(QUANTIZABLE)}, not their subclasses)"
    if parameter not in ("weight", "weight_orig"):  # the second where torch.nn.utils.prune masks it
        return None, f"a {parameter} stays float"
    if kind == "Embedding" and rule.scheme.activation != "none":
        # An embedding's input is a token id, so only the weight part of the scheme applies.
        return rule.scheme.weight, f"rule {rule.label} (weight only)"
    return rule.scheme, f"rule {rule.label}"


def _matches(rule: Rule, decision: Decision) -> bool:
    names = {decision.module, decision.module if decision.alias is None else decision.alias}
    return (
        (rule.role is None or rule.role == decision.role)
        and (rule.type is None or rule.type == decision.type)
        and (rule.name is None or any(fnmatch.fnmatchcase(name, rule.name) for name in names))
    )


def _type_name(module: nn.Module) -> str:
    """``Linear`` for exactly torch.nn.Linear; a subclass, which may compute something else, in full."""
    if hasattr(module, "weight_fake_quantizer"):  # prepared already, so it was one of these
        return "Embedding" if hasattr(module, "embedding_dim") else "Linear"
    cls = plain_class(module)
    return cls.__name__ if cls.__module__.startswith("torch.nn.") else f"{cls.__module__}.{cls.__name__}"


def _wanted_type(module: nn.Module) -> str:
    """What a layer that its adapter or another quantizer made its own was meant to be."""
    from torch import nn

    kinds = [kind for kind in QUANTIZABLE if isinstance(module, getattr(nn, kind))]
    return kinds[0] if kinds else _type_name(module)


def _qualified(module: str, parameter: str) -> str:
    leaf = parameter.rpartition(".")[2]
    return f"{module}.{leaf}" if module else leaf


def _refuse_lazy(name: str, parameter: nn.Parameter) -> None:
    from torch.nn.parameter import is_lazy

    if is_lazy(parameter):
        raise QawareError(f"{name}: has no shape yet; run one batch through the model before quantizing it")


def _refuse_dead_patterns(recipe: Recipe, modules: dict[str, nn.Module], aliases: set[str]) -> None:
    for rule in recipe.rules:
        if rule.name is not None and not any(fnmatch.fnmatchcase(n, rule.name) for n in (*modules, *aliases)):
            names = [n for n, m in modules.items() if n and any(True for _ in m.parameters(recurse=False))]
            raise QawareError(f"name: {rule.name!r} matches no module{_suggest(rule.name, names[:40])}")
