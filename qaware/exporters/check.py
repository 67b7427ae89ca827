"""Find, before anything expensive starts, what a runtime cannot hold, and the nearest choice that all can."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qaware.errors import QawareError
from qaware.exporters.base import Exporter
from qaware.matching import CONVOLUTIONS, rematch
from qaware.plan import Decision, Plan, nearest_groups, unfit
from qaware.recipe import Recipe
from qaware.scheme import FLOAT16_BITS, Scheme
from qaware.shipped import recipe_names


@dataclass(frozen=True)
class Problem:
    """One thing that cannot work, with the way out."""

    layer: str
    """Module name; empty when the whole model or the machine is meant."""
    message: str
    nearest: Scheme | None = None
    """The nearest scheme that every named runtime can hold."""

    def __str__(self) -> str:
        return self.text(self.layer, self.layer)

    def text(self, where: str, pattern: str) -> str:
        """One line about ``where``, with the rule that ends the problem for the layers of ``pattern``."""
        head = f"{where}: {self.message}" if where else self.message
        if self.nearest is None:
            return head
        fields = ", ".join(f"{k}: {v}" for k, v in self.nearest.to_dict().items())
        rule = f"{{name: {pattern!r}, scheme: {{{fields}}}}}"
        return f"{head}; nearest legal: {self.nearest.label}, by the first rule {rule}"


def check(plan: Plan, exporters: Sequence[Exporter]) -> list[Problem]:
    """Everything that keeps ``plan`` from running on ``exporters``; empty when nothing does."""
    problems = [Problem("", message) for e in exporters if (message := e.missing())]
    problems += [Problem("", message) for e in exporters if (message := e.refuse_plan(plan))]
    for decision in plan.decisions:
        if decision.scheme is not None and (why := _refusal(decision, exporters)):
            problems.append(Problem(decision.module, why, _nearest(decision, exporters)))
    return problems


def require_legal(plan: Plan, exporters: Sequence[Exporter]) -> None:
    """Raise one error for all problems.

    Raises:
        QawareError: one line that names each layer, the value and the nearest legal choice.
    """
    if problems := check(plan, exporters):
        texts = " | ".join(_merged(problems))
        raise QawareError(f"recipe {plan.recipe.name!r}: {texts}{_other_recipes(plan, exporters)}")
    plan.require_possible()


def _merged(problems: Sequence[Problem]) -> list[str]:
    """One text for the layers that differ only in their block's number, with a pattern for all of them."""
    groups: dict[tuple[str, str, Scheme | None], list[Problem]] = {}
    for problem in problems:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", problem.layer)
        groups.setdefault((pattern, problem.message, problem.nearest), []).append(problem)
    return [
        str(same[0]) if len(same) == 1 else same[0].text(f"{same[0].layer} and {len(same) - 1} more", pattern)
        for (pattern, _, _), same in groups.items()
    ]


def _other_recipes(plan: Plan, exporters: Sequence[Exporter]) -> str:
    """The named recipes that every exporter can hold as they are."""
    # Those with a rounding of their own have the schemes of others.
    named = {name: recipe for name in recipe_names() if not (recipe := Recipe.load(name)).rounds}
    legal = [name for name, recipe in named.items() if not check(rematch(plan, recipe), exporters)]
    return f"; legal as they are: {', '.join(legal)}" if legal else ""


def _refusal(decision: Decision, exporters: Sequence[Exporter]) -> str | None:
    scheme = decision.scheme
    assert scheme is not None
    if why := unfit(scheme, decision.width):
        return why
    if decision.type in CONVOLUTIONS and scheme.is_float:
        return f"bits: 16 is for Linear and Embedding, not {decision.type}; use bits: 8"
    if decision.type in CONVOLUTIONS and scheme.activation == "int8-dynamic":
        return "int8-dynamic measures a range for each token, which a convolution has not; use int8-static"
    for exporter in exporters:
        if why := exporter.refuse(decision):
            return f"{exporter.name}: {why}"
    return None


def _nearest(decision: Decision, exporters: Sequence[Exporter]) -> Scheme | None:
    """The first candidate that no exporter refuses."""
    for scheme in _candidates(decision):
        if _refusal(dataclasses.replace(decision, scheme=scheme), exporters) is None:
            return scheme
    return None


def _candidates(decision: Decision) -> Iterator[Scheme]:
    """Nearest first: other groups, scale precision, symmetry, activation, then more bits, then float16."""
    wanted = decision.scheme
    assert wanted is not None
    if wanted.is_float:
        yield from (Scheme(8), Scheme(8, activation="int8-static"))
        return
    other = "int8-static" if decision.type in CONVOLUTIONS else "int8-dynamic"
    activations = ["none"] if decision.type == "Embedding" else [wanted.activation, other, "none"]
    for bits, activation, symmetric, dtype, group in itertools.product(
        range(wanted.bits, 9),
        dict.fromkeys(activations),
        dict.fromkeys((wanted.symmetric, True)),
        dict.fromkeys((wanted.scale_dtype, "bfloat16", "float32")),
        _groups(decision.width, wanted.group_size),
    ):
        observer = wanted.observer if activation == wanted.activation else "minmax"
        per_tensor = wanted.per_tensor and activation == wanted.activation and group == 0
        levels = wanted.levels if bits == wanted.bits and symmetric else "all"
        yield Scheme(bits, group, activation, symmetric, dtype, observer, per_tensor, levels)
    yield Scheme(FLOAT16_BITS)


def _groups(width: int, wanted: int) -> list[int]:
    """Group sizes that divide a row of ``width``, nearest first. The row itself is 0 before it is its width,
    which is left to runtimes that have groups only."""
    near = nearest_groups(width, wanted or width)
    return [group for size in near for group in ((0, size) if size == width else (size,))] or [0]
