"""What a search may choose from, and whether its budget leaves room for any of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qaware.errors import QawareError
from qaware.exporters.base import Exporter
from qaware.mixed.budget import Budget
from qaware.mixed.candidates import candidates
from qaware.mixed.weights import Schemes, StoredWeight, stored_weights
from qaware.plan import Plan


def parse_widths(text: str) -> tuple[int, ...]:
    """Widths from the command line's form, e.g. ``3,4,8``.

    Raises:
        QawareError: another form.
    """
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise QawareError(f"bits: {text!r} must be widths with commas between them, e.g. 3,4,8") from error


def open_choices(
    plan: Plan, budget: Budget, widths: Sequence[int], exporters: Sequence[Exporter]
) -> tuple[list[StoredWeight], list[list[Schemes]]]:
    """The weights that a runtime takes in some width, and their choices. Others stay float.

    Raises:
        QawareError: a runtime refuses the plan as a whole, there are no such weights, or the smallest have
            more bits for each weight than the budget.
    """
    if refused := [message for e in exporters if (message := e.refuse_plan(plan))]:
        raise QawareError(f"recipe {plan.recipe.name!r}: {' | '.join(refused)}")
    weights = stored_weights(plan)
    if not weights:
        plan.require_possible()
    pairs = [(w, candidates(plan, w, widths, exporters)) for w in weights]
    pairs = [(w, c) for w, c in pairs if c]
    if not pairs:
        names = ", ".join(exporter.name for exporter in exporters) or "qaware"
        raise QawareError(
            f"bits: {','.join(map(str, widths))}: {names} holds none of them for any layer of "
            f"recipe {plan.recipe.name!r}; give other bits, or a base with the activations that it needs"
        )
    opened = [w for w, _ in pairs], [c for _, c in pairs]
    if budget.kind == "bpw":  # so that it is said before the training
        require_room(budget, *opened, rest=0)
    return opened


def require_room(
    budget: Budget, weights: Sequence[StoredWeight], choices: Sequence[Sequence[Schemes]], rest: int
) -> None:
    """Refuse a budget below the smallest choices.

    Args:
        budget: of any kind; whether nats can be met is not known before they are measured.
        weights: stored ones.
        choices: of each.
        rest: bytes of what is not quantized; of no account for ``bpw``.

    Raises:
        QawareError: names the smallest budget that can be met.
    """
    if budget.kind == "d_nats":
        return
    least = sum(min(w.bytes(s) for s in c) for w, c in zip(weights, choices, strict=True))
    numel = sum(weight.numel for weight in weights)
    if budget.packed(numel, rest) < least:
        bpw = math.ceil(8000 * least / numel) / 1000
        reach = f"{bpw:g}bpw" if budget.kind == "bpw" else f"bytes={least + rest}"
        raise QawareError(
            f"budget: {budget.text} is out of reach; the smallest that these widths and runtimes allow "
            f"is {reach}, with scales{'' if budget.kind == 'bpw' else ' and what stays float'}"
        )
