"""What half a bit more for each weight wins back where it is spent on the layers that need it."""

from __future__ import annotations

import dataclasses

import qaware
from benchmarks.case import FLOAT, Case
from benchmarks.quality_ptq import recipe
from benchmarks.rows import Row
from qaware.metrics.score import Score, paired

WIDTHS = (2, 3, 4, 5, 6)
CHOSEN_ON = 40
"""Windows that the search sees; the row is measured on the others."""


def mixed(case: Case, bits: int) -> list[Row]:
    """One width for all layers, and a recipe of half a bit more, both by nearest rounding."""
    base = recipe(case, bits, narrow={"bits": bits})
    uniform, richer = f"int{bits} uniform", f"int{bits} + 0.5 bit"
    case.ptq(uniform, base)
    spent = _bits_per_weight(case, base)
    found = qaware.search(
        case.models[FLOAT], base, case.data, f"{spent + 0.5:.4f}bpw", bits=WIDTHS, windows=CHOSEN_ON
    )
    case.ptq(richer, found.recipe)
    gap, width = _held_out(case, uniform)
    left, left_width = _held_out(case, richer)
    closed = (gap - left) / gap
    count = len(case.score(FLOAT, "float").losses) - CHOSEN_ON
    return [
        Row(
            row=f"mixed precision at +0.5 bit per weight, {case.name}: share of the gap to float",
            published="AutoRound: half of the remaining gap",
            target="at least half",
            value=f"{closed:.1%} of {gap:.3f} nats ({spent:.2f} to {found.point.bpw:.2f} bits per weight)",
            met=closed >= 0.5,
            case=f"{case.name}, chosen on the first {CHOSEN_ON} windows, measured on the other {count}; "
            f"widths {', '.join(map(str, WIDTHS))}, nearest rounding",
            missed_by="" if closed >= 0.5 else f"{0.5 - closed:.1%}",
            details=[
                {"model": f"{uniform}, other windows", "d_nats": gap, "ci95": width},
                {"model": f"{richer}, other windows", "d_nats": left, "ci95": left_width},
                case.detail(uniform),
                case.detail(richer),
            ],
        )
    ]


def _bits_per_weight(case: Case, base: object) -> float:
    """Of the quantized weights, with their scales."""
    from qaware.engines.base import packed_bytes

    model = qaware.quantize(case.models[FLOAT], base)  # type: ignore[arg-type]
    held = {w.data.data_ptr(): w for w in model.weights.values()}.values()
    return 8 * sum(packed_bytes(w) for w in held) / sum(w.data.numel() for w in held)


def _held_out(case: Case, label: str) -> tuple[float, float]:
    """Nats above float, with their interval, on the windows that the search did not see."""
    pair = (case.score(label), case.score(FLOAT, "float"))
    return paired(*(_after(score) for score in pair))


def _after(score: Score) -> Score:
    return dataclasses.replace(score, losses=score.losses[CHOSEN_ON:], counts=score.counts[CHOSEN_ON:])
