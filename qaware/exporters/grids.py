"""A model leaves only on the grid that its integers were made for.

Two grids of the same width hold other values: integers of one, read as those of the other, are another model,
and nothing about their shapes need say so. A model trained to 2 bits on one grid lost a factor of ten in
perplexity when it was written in another.
"""

from __future__ import annotations

from torch import Tensor

from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.errors import QawareError
from qaware.scheme import Scheme


def require_grids(quantized: QuantizedModel) -> None:
    """Refuse a model whose plan is of other grids than its integers.

    Raises:
        QawareError: names the layer and both grids.
    """
    for name, decision in quantized.plan.quantized.items():
        weight = quantized.weights.get(name)
        if weight is None or decision.scheme is None:
            continue
        held, planned = weight.scheme.weight, decision.scheme.weight
        if held != planned:
            raise QawareError(
                f"{name}: was made on the grid {held.label} ({held.scale_dtype} scales), its plan is of "
                f"{planned.label} ({planned.scale_dtype} scales); convert the prepared model under this "
                "recipe, or export it under its own"
            )
        if why := _off_grid(weight):
            raise QawareError(
                f"{name}: {why}, which is not on the grid {planned.label} of its plan; convert it again"
            )


def _off_grid(weight: QuantizedWeight) -> str | None:
    """Why the integers and scales cannot be on the grid that they say, or None."""
    scheme = weight.scheme
    if scheme.is_float or weight.scale is None:
        return None
    rows, width = weight.data.shape
    wanted = (rows, width // scheme.block(width))
    if tuple(weight.scale.shape) != wanted:
        return f"has scales of shape {tuple(weight.scale.shape)} instead of {wanted}"
    if (weight.zero_point is None) != scheme.symmetric:
        return f"has {'no ' if weight.zero_point is None else ''}zero points"
    return _off_levels(weight.data, scheme)


def _off_levels(data: Tensor, scheme: Scheme) -> str | None:
    lowest, highest = int(data.min()), int(data.max())
    if lowest < scheme.range[0] or highest > scheme.range[1]:
        return f"has integers from {lowest} to {highest}"
    if scheme.is_stretched and bool((data % 2 == 0).any()):
        return "has even integers"
    others = set() if scheme.level_set is None else set(data.unique().tolist()) - set(scheme.level_set)
    return f"has integers such as {min(others)}" if others else None
