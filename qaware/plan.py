"""What a recipe does to a model: the fate of every parameter, with the reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from qaware.errors import QawareError
from qaware.layout import Layout
from qaware.recipe import Recipe
from qaware.scheme import Scheme
from qaware.wording import counted

FOLDED = "folded into"


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
    """Why the parameter does not ship by itself: it belongs to an adapter or a folded batch norm; None for
    all others."""
    obstacle: str | None = None
    """Why an adapter keeps the weight from being quantized, under any scheme."""

    @property
    def width(self) -> int:
        """Weights in a row: in_features of a Linear, embedding_dim of an Embedding, what one output channel
        of a convolution holds."""
        return self.numel // self.shape[0] if len(self.shape) > 1 else (*self.shape, 1)[0]

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
    layout: Layout | None = None
    """Where activations are rounded; None for the ``modules`` engine, which rounds what enters a layer."""

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

    @property
    def needs_batches(self) -> bool:
        """Whether PTQ looks at calibration batches, for ranges or for the rounding of weights."""
        return self.needs_calibration or self.recipe.needs_data

    def layer(self, name: str) -> Decision:
        """The decision on the weight of module ``name``."""
        return self.quantized[name]

    def with_layout(self, layout: Layout | None) -> Plan:
        """The plan as ``layout`` has it: static layers that have no place there stay float, and batch norms
        that are folded ship nothing of their own."""
        if layout is None:
            return self
        return Plan(self.recipe, tuple(_laid(d, layout) for d in self.decisions), layout)

    def renamed(self, names: Mapping[str, str]) -> Plan:
        """The decisions on the modules in ``names``, under their new names."""
        kept = [d for d in self.decisions if d.module in names]
        parameters = {d.parameter: qualified(names[d.module], d.parameter) for d in kept}
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
        done = sum({_owner(d): d.numel for d in self.quantized.values()}.values())
        total = sum(d.numel for d in self.decisions if d.tied_to is None and d.dropped is None)
        return (
            f"{self.recipe.name}: {counted(len(self.quantized), 'layer')}, {done:,} of {total:,} parameters "
            f"({done / max(total, 1):.1%}) quantized{self._left_float()}"
        )

    def _left_float(self) -> str:
        """The types that hold most of what stays float, so that a layer left out is not overlooked. A weight
        that is quantized for one of those that share it counts there."""
        held: Counter[str] = Counter()
        done = {_owner(d) for d in self.quantized.values()}
        for decision in self.skipped:
            if decision.tied_to is None and decision.dropped is None and decision.parameter not in done:
                held[decision.type.rpartition(".")[2]] += decision.numel
        text = ", ".join(f"{kind} {count:,}" for kind, count in held.most_common(3))
        adapters = sum(d.numel for d in self.decisions if d.dropped and not d.dropped.startswith(FOLDED))
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


def _owner(decision: Decision) -> str:
    """The first of the parameters that are the same tensor."""
    return decision.tied_to or decision.parameter


def _laid(decision: Decision, layout: Layout) -> Decision:
    into = next((site.module for site in layout.layers if site.batch_norm == decision.module), None)
    if into is not None:
        why = f"{FOLDED} {into}"
        return dataclasses.replace(decision, scheme=None, problem=None, reason=why, dropped=why)
    unlaid = layout.layer(decision.module) is None
    if unlaid and decision.scheme is not None and decision.scheme.is_static:
        why = "stays float: left out when the model was laid out"
        return dataclasses.replace(decision, scheme=None, problem=None, reason=why)
    return decision


def indivisible(scheme: Scheme | None, width: int) -> str | None:
    """Why a row of ``width`` weights cannot be cut into the scheme's groups, or None."""
    if scheme is None or not scheme.group_size or width % scheme.group_size == 0:
        return None
    return f"group_size {scheme.group_size} does not divide its {width} input weights"


def unfit(scheme: Scheme | None, width: int) -> str | None:
    """Why rows of ``width`` weights cannot have ``scheme`` on any runtime, or None."""
    if scheme is not None and scheme.activation == "int8-dynamic" and width == 1:
        return "int8-dynamic measures a range for each token, and one input is none; use activation: none"
    return indivisible(scheme, width)


def nearest_groups(width: int, wanted: int) -> list[int]:
    """Group sizes (2 or more) that divide ``width``, nearest to ``wanted`` (by ratio) first."""
    divisors = [g for g in range(2, width + 1) if width % g == 0]
    return sorted(divisors, key=lambda g: (max(g, wanted) / min(g, wanted), g))


def _group_choice(decision: Decision) -> str:
    if decision.obstacle is not None or indivisible(decision.scheme, decision.width) is None:
        return ""
    assert decision.scheme is not None
    sizes = nearest_groups(decision.width, decision.scheme.group_size)
    near = [str(size) for size in sizes if size != decision.width][:3]  # the whole row is 0
    groups = f"{' or '.join(near)}, or " if near else ""
    return f"; nearest legal group_size: {groups}0 (one scale per output channel)"


def qualified(module: str, parameter: str) -> str:
    """The name of a parameter, itself qualified or not, in ``module``."""
    leaf = parameter.rpartition(".")[2]
    return f"{module}.{leaf}" if module else leaf
