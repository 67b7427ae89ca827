"""What training wins back: int4 in each runtime, and two bits."""

from __future__ import annotations

from typing import Any

from benchmarks.case import FLOAT, Case
from benchmarks.quality_ptq import EIGHT, recipe
from benchmarks.rows import Row

RUNTIMES = ("executorch", "aoti", "tract")
STEPS, LR = 300, 1e-3
TWO_BIT_STEPS, TWO_BIT_LR = 600, 2e-3
ADAPTED = "float, adapted"
MOST_HOP = 0.02


def adapted(case: Case) -> str:
    """The float model after as many steps on the training text: what is then quantized, and what its control
    trains on from, so that neither the quantized model nor the control is ahead by having seen the text."""
    if ADAPTED not in case.models:
        case.finetune(ADAPTED, STEPS, LR)
    return ADAPTED


def int4(case: Case) -> list[Row]:
    """QAT with int8 activations and int4 weights, against PTQ of a float model with as many steps."""
    source, base = adapted(case), f"float control, {STEPS} steps"
    case.finetune(base, STEPS, LR, source)
    asked = recipe(case, 4, activation="int8-dynamic")
    case.ptq("int4 ptq", asked, base, RUNTIMES)
    learned = {**asked, "learning": "lsq"}
    case.qat("int4 qat", learned, base, STEPS, LR, RUNTIMES, source, distillation=1.0)
    rows = [_recovered(case, runtime, base) for runtime in RUNTIMES]
    return [*rows, _hops(case, base)]


def _recovered(case: Case, runtime: str, base: str) -> Row:
    ptq, qat = (case.loss(f"int4 {method}", runtime, base) for method in ("ptq", "qat"))
    share = (ptq - qat) / ptq
    return Row(
        row=f"QAT recovers the int4 loss, measured in {runtime}",
        published="torchao 34 to 40%, torchtune 42%, NNCF 30 to 69%",
        target="at least 70%",
        value=f"{share:.1%} of {ptq:.3f} nats",
        met=share >= 0.7,
        case=f"{case.name}, int4 groups of 32 and int8-dynamic activations, embedding too, seed {case.seed}, "
        f"{STEPS} steps, lr {LR:g} (cosine), learned scales, distillation 1; float control of as many steps",
        missed_by="" if share >= 0.7 else f"{0.7 - share:.1%}",
        details=[
            case.detail(FLOAT, "float", base),
            case.detail(base, "float", base),
            *(case.detail(f"int4 {method}", runtime, base) for method in ("ptq", "qat")),
        ],
    )


def _hops(case: Case, base: str) -> Row:
    loss = case.loss("int4 ptq", "converted", base)
    prepared = case.loss("int4 qat", "prepared", base)
    hops = {r: abs(case.loss("int4 qat", r, base) - prepared) / loss for r in ("converted", *RUNTIMES)}
    largest = max(hops.values())
    return Row(
        row="hops between prepared and each runtime, of the PTQ loss",
        published="not measured by others",
        target=f"below {MOST_HOP:.0%}",
        value=", ".join(f"{runtime} {hop:.2%}" for runtime, hop in hops.items()),
        met=largest < MOST_HOP,
        case=f"{case.name}, the QAT model above",
        missed_by="" if largest < MOST_HOP else f"{largest - MOST_HOP:.2%}",
        details=[case.detail("int4 qat", s, base) for s in ("prepared", "converted", *RUNTIMES)],
    )


def two_bits(case: Case) -> list[Row]:
    """Two bits: nearest rounding collapses; training in stretched levels with learned scales."""
    source, base = adapted(case), f"float control, {TWO_BIT_STEPS} steps"
    case.finetune(base, TWO_BIT_STEPS, TWO_BIT_LR, source)
    case.ptq("int2 rtn", recipe(case, 2, ends=EIGHT), base)
    stretched: dict[str, Any] = {**recipe(case, 2, ends=EIGHT, levels="stretched"), "learning": "lsq"}
    case.qat("int2 qat", stretched, base, TWO_BIT_STEPS, TWO_BIT_LR, (), source, distillation=1.0)
    rtn, qat = (case.loss(f"int2 {method}", "converted", base) for method in ("rtn", "qat"))
    share = (rtn - qat) / rtn
    return [
        Row(
            row="2-bit: RTN collapse, and QAT",
            published="603k to 30 perplexity, 89% of the nats",
            target="at least 92% of the nats",
            value=f"{share:.1%} of {rtn:.2f} nats",
            met=share >= 0.92,
            case=f"{case.name}, 2 bits in groups of 32, embedding and head at 8; seed {case.seed}, "
            f"{TWO_BIT_STEPS} steps, lr {TWO_BIT_LR:g} (cosine), stretched levels, learned scales, "
            "distillation 1; float control of as many steps",
            missed_by="" if share >= 0.92 else f"{0.92 - share:.1%}",
            details=[
                case.detail(FLOAT, "float", base),
                case.detail(base, "float", base),
                case.detail("int2 rtn", "converted", base),
                case.detail("int2 qat", "converted", base),
            ],
        )
    ]
