"""What products of int8 activations with integer weights cannot hold, in any runtime that has them."""

from __future__ import annotations

from qaware.scheme import Scheme


def refuse_static(scheme: Scheme, where: str) -> str | None:
    """Why a layer with int8-static activations is refused, or None.

    Args:
        scheme: of the layer.
        where: the runtime, or its library of kernels, for the message.
    """
    if scheme.group_size:
        return f"layers with int8-static activations have one scale per channel in {where}, no groups"
    if not scheme.symmetric:
        return f"weights with int8-static activations have no zero points in {where}; use symmetric: true"
    return None
