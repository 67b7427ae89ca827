"""What is won without training: GPTQ in tract's grid, the order of methods, SmoothQuant, falling widths."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from benchmarks.case import FLOAT, Case
from benchmarks.rows import Row

GROUP = 32
EIGHT = {"bits": 8}


def grid(bits: int, **scheme: Any) -> dict[str, Any]:
    """A scheme in groups of 32 with scales that every runtime holds."""
    return {"bits": bits, "group_size": GROUP, "scale_dtype": "bfloat16", **scheme}


def recipe(
    case: Case,
    bits: int,
    rounding: Any = "rtn",
    narrow: dict[str, Any] | None = None,
    ends: dict[str, Any] | None = None,
    **scheme: Any,
) -> dict[str, Any]:
    """Linear layers and embeddings in groups of 32.

    Args:
        case: the model.
        bits: of a weight.
        rounding: how the integers are chosen.
        narrow: of layers whose width the groups do not divide, which have one scale for each channel; 8 bits
            by default.
        ends: of the embedding and the head, where they are to differ from the rest.
        scheme: further fields of the scheme.
    """
    apart = [
        {"name": f"*.{n}", "scheme": {**(narrow or EIGHT), **_activation(scheme)}} for n in indivisible(case)
    ]
    head = [] if ends is None else [{"role": "head", "scheme": {**ends, **_activation(scheme)}}]
    return {
        "name": f"int{bits}",
        "rounding": rounding,
        "rules": [
            *apart,
            *head,
            {"role": "embedding", "scheme": ends or grid(bits, **_levels(scheme))},
            {"type": "Linear", "scheme": grid(bits, **scheme)},
        ],
    }


def _activation(scheme: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in scheme.items() if k == "activation"}


def _levels(scheme: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in scheme.items() if k == "levels"}


def indivisible(case: Case) -> list[str]:
    """The last parts of the names of linear layers whose width is no multiple of the group."""
    modules = case.models[FLOAT].named_modules()
    return sorted(
        {n.rpartition(".")[2] for n, m in modules if isinstance(m, nn.Linear) and m.in_features % GROUP}
    )


SIGNED = {"gptq": {"signed": True}}
"""A block of Q4_0 may have a scale below zero, which turns its range of -8 to 7 around."""


GPTQ_BATCHES = 96


def gptq_in_tract(case: Case) -> list[Row]:
    """RTN and GPTQ in Q4_0, exported to tract and scored there; in the second pair with the embedding."""
    for name, ends in (("Q4_0", EIGHT), ("Q4_0 all", None)):
        case.ptq(f"{name} rtn", recipe(case, 4, ends=ends), export=["tract"])
        asked = recipe(case, 4, SIGNED, ends=ends)
        case.ptq(f"{name} gptq", asked, export=["tract"], batches=GPTQ_BATCHES)
    rtn = case.loss("Q4_0 rtn", "tract")
    closed = (rtn - case.loss("Q4_0 gptq", "tract")) / rtn
    return [
        Row(
            row="GPTQ inside Q4_0, measured in tract: RTN loss closed",
            published="Brevitas OPTQ 63%, Qronos 75%",
            target="at least 65%, then 75%",
            value=f"{closed:.1%} of {rtn:.3f} nats"
            + ("" if closed >= 0.75 else f"; {0.75 - closed:.1%} short of 75%"),
            met=closed >= 0.65,
            case=f"{case.name}, linear layers in Q4_0, embedding and head at 8 bits; all: these too; "
            f"calibrated on {GPTQ_BATCHES} batches of {case.data.batch_size}",
            missed_by="" if closed >= 0.65 else f"{0.65 - closed:.1%}",
            details=[
                case.detail(f"{name} {method}", "tract")
                for name in ("Q4_0", "Q4_0 all")
                for method in ("rtn", "gptq")
            ],
        )
    ]


METHODS = ("rtn", "percentile", "mse", "hqq", "awq", "gptq")


def order(case: Case, bits: int) -> list[Row]:
    """Every method in the same grid."""
    for method in METHODS:
        if (f"int{bits} {method}", "converted") not in case.ledger.scores:
            case.ptq(f"int{bits} {method}", recipe(case, bits, method))
    loss = {method: case.loss(f"int{bits} {method}") for method in METHODS}
    met = loss["gptq"] < loss["awq"] < loss["rtn"] and max(loss["mse"], loss["hqq"]) < loss["rtn"]
    ranked = sorted(METHODS, key=lambda method: loss[method])
    return [
        Row(
            row=f"order per group, {case.name} int{bits}: GPTQ < AWQ < RTN; MSE and HQQ below RTN",
            published="Quark OPT-125M, Qwen1.5-0.5B: GPTQ < AWQ < RTN",
            target="same order",
            value=" < ".join(f"{method} {loss[method]:.3f}" for method in ranked),
            met=met,
            case=f"{case.name}, int{bits} groups of {GROUP}, nats above float",
            details=[case.detail(f"int{bits} {method}") for method in ranked],
        )
    ]


def ladder(case: Case) -> list[Row]:
    """Nearest rounding at falling widths; 8 bits with one scale a channel, as they ship."""
    wide = {
        "name": "int8",
        "rules": [{"role": "embedding", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": {"bits": 8}}],
    }
    labels = []
    for bits in (8, 5, 4, 3, 2):
        label = f"int{bits} rtn"
        if (label, "converted") not in case.ledger.scores:
            case.ptq(label, wide if bits == 8 else recipe(case, bits))
        labels.append(label)
    kl = [case.score(label).kl or 0.0 for label in labels]
    falls = all(a < b for a, b in itertools.pairwise(kl))
    return [
        Row(
            row=f"KL to float, {case.name}: q8 < q5 < q4 < q3 < q2",
            published="llama.cpp: 0.0014 (q8_0) to 0.07 (q4_0)",
            target="monotone, int8 at most 0.001",
            value=", ".join(f"{label[3]}: {value:.4f}" for label, value in zip(labels, kl, strict=True)),
            met=falls and kl[0] <= 0.001,
            case=f"{case.name}, nearest rounding, groups of {GROUP}, 8 bits per channel",
            details=[case.detail(label) for label in labels],
        )
    ]
