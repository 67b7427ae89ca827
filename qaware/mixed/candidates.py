"""Which schemes a layer may get: its own at other widths, as far as every runtime holds them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from qaware.errors import QawareError
from qaware.exporters.base import Exporter
from qaware.exporters.check import check
from qaware.mixed.weights import Schemes, StoredWeight, assigned
from qaware.plan import Plan

WIDTHS = (2, 3, 4, 5, 6, 8)


def candidates(
    plan: Plan, weight: StoredWeight, widths: Sequence[int], exporters: Sequence[Exporter]
) -> list[Schemes]:
    """One for each of ``widths`` that every one of ``exporters`` holds, fewest bits first.

    Of each width it is the layer's own scheme with those bits; where groups do not divide it, or a runtime
    takes none of that width, with a scale for each channel; then with another precision of the scales. A
    float16 weight stays one. Empty where nothing is legal.
    """
    if any(scheme.is_float for scheme in weight.schemes):
        return [weight.schemes] if _legal(plan, weight, weight.schemes, exporters) else []
    found = (
        next((s for s in _variants(weight, bits) if _legal(plan, weight, s, exporters)), None)
        for bits in sorted(widths)
    )
    return [schemes for schemes in found if schemes is not None]


def _variants(weight: StoredWeight, bits: int) -> Iterator[Schemes]:
    own = weight.schemes[0]
    for levels, group, dtype in itertools.product(
        dict.fromkeys((own.levels, "all")),  # few widths have others
        dict.fromkeys((own.group_size, 0)),
        dict.fromkeys((own.scale_dtype, "bfloat16", "float32")),
    ):
        with contextlib.suppress(QawareError):  # what a scheme says does not go with every width
            yield tuple(
                dataclasses.replace(s, bits=bits, group_size=group, scale_dtype=dtype, levels=levels)
                for s in weight.schemes
            )


def _legal(plan: Plan, weight: StoredWeight, schemes: Schemes, exporters: Sequence[Exporter]) -> bool:
    planned = [dataclasses.replace(d, scheme=s) for d, s in zip(weight.decisions, schemes, strict=True)]
    if any(exporter.refuse(decision) for exporter in exporters for decision in planned):
        return False  # `check` says so too, but searches the nearest legal choice with it
    alone = assigned(plan, dict(zip(weight.names, schemes, strict=True)))
    return not any(problem.layer for problem in check(alone, exporters))
