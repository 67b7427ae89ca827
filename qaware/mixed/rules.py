"""From a scheme for each layer to a recipe: few rules that read well, and do exactly that."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from qaware.errors import QawareError
from qaware.matching import QUANTIZABLE, rematch
from qaware.plan import Plan
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme

Fates = Mapping[str, Scheme | None]
"""By module name; None: stays float."""


def merged_recipe(plan: Plan, name: str, description: str) -> Recipe:
    """A recipe that gives the layers of ``plan`` their schemes, by patterns for those that share one.

    Specific rules come first: layers that differ from others of their name, then names, then types. All that
    the recipe of ``plan`` says beside its rules stays.
    """
    rules = [rule for kind in QUANTIZABLE for rule in _rules_for(kind, _fates(plan, kind))]
    if not any(rule.scheme for rule in rules):
        raise QawareError(
            f"recipe {plan.recipe.name!r}: leaves every layer in float, so there is none to write"
        )
    recipe = dataclasses.replace(plan.recipe, name=name, description=description, rules=tuple(rules))
    if _schemes(rematch(plan, recipe)) != _schemes(plan):  # names that look like patterns
        recipe = dataclasses.replace(recipe, rules=one_by_one(plan).rules)
    return recipe


def one_by_one(plan: Plan) -> Recipe:
    """The recipe of ``plan`` with one rule for each quantized layer."""
    rules = tuple(Rule(d.scheme, name=glob.escape(name)) for name, d in plan.quantized.items())
    return dataclasses.replace(plan.recipe, rules=rules)


def _schemes(plan: Plan) -> dict[str, Scheme | None]:
    return {d.parameter: d.scheme for d in plan.decisions}


def _fates(plan: Plan, kind: str) -> dict[str, Scheme | None]:
    """Of all layers of a type, also those that stay float: no pattern may catch them."""
    parameters = ("weight", "weight_orig")
    return {
        d.module: d.scheme
        for d in plan.decisions
        if d.type == kind and d.parameter.rpartition(".")[2] in parameters and d.dropped is None
    }


def _rules_for(kind: str, fates: Fates) -> list[Rule]:
    """Of the layers of one type, the last rule being for all that no other one catches."""
    if not fates:
        return []
    usual = _usual(fates.values())
    groups: dict[str, dict[str, Scheme | None]] = {}
    for name, scheme in fates.items():
        groups.setdefault(name.rpartition(".")[2], {})[name] = scheme
    single, shared = [], []
    for leaf, group in groups.items():
        own, apart = _usual(group.values()), _exceptions(kind, group, usual)
        through_leaf = _exceptions(kind, group, own)
        if own != usual and len(through_leaf) + 1 <= len(apart):
            single += through_leaf
            dot = "." if all("." in name for name in group) else ""
            shared.append(Rule(own, name=f"*{dot}{glob.escape(leaf)}"))
        else:
            single += apart
    last = [] if usual is None else [Rule(usual, type=kind)]
    return [*single, *shared, *last]


def _usual(schemes: Iterable[Scheme | None]) -> Scheme | None:
    """The most common; of equally common ones the first."""
    return Counter(schemes).most_common(1)[0][0]


def _exceptions(kind: str, group: Fates, usual: Scheme | None) -> list[Rule]:
    """Rules for the layers of a group whose scheme is not the usual one."""
    by_scheme: dict[Scheme | None, list[str]] = {}
    for name, scheme in group.items():
        if scheme != usual:
            by_scheme.setdefault(scheme, []).append(name)
    return [Rule(scheme, name=p) for scheme, names in by_scheme.items() for p in patterns(names)]


def patterns(names: Sequence[str]) -> list[str]:
    """Shell patterns for exactly these names: those that differ in the last digit of their first number are
    one, e.g. ``layers.[02].up``."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        number = re.search(r"(?<=\.)(\d*)(\d)(?=\.)", name)
        if number is None:
            found[(name, "")] = []
        else:
            found.setdefault((name[: number.end(1)], name[number.end() :]), []).append(number[2])
    return [_pattern(before, sorted(set(digits)), after) for (before, after), digits in found.items()]


def _pattern(before: str, digits: list[str], after: str) -> str:
    if len(digits) < 2:
        return glob.escape(before) + "".join(digits) + glob.escape(after)
    low, high = digits[0], digits[-1]
    run = int(high) - int(low) + 1 == len(digits) > 2
    choice = f"{low}-{high}" if run else "".join(digits)
    return f"{glob.escape(before)}[{choice}]{glob.escape(after)}"
