"""How a ``.tflite`` file holds a layer: bits, blocks, and whether its operator computes with the integers."""

from __future__ import annotations

from qaware.plan import Decision
from qaware.scheme import Scheme

BLOCKS = (256, 128, 64, 32)
"""Weights that share a scale in products with int8-dynamic activations, and in look-ups."""
_HALF_BYTE = 4


def bits_of(scheme: Scheme, width: int) -> int:
    """Bits that a weight takes in the file, ``width`` in a row: 8 in int8 products, and where a row of 4 bits
    would end within a byte, which EMBEDDING_LOOKUP reads wrongly."""
    narrow = scheme.stored_bits <= _HALF_BYTE and not scheme.is_static and width % 2 == 0
    return _HALF_BYTE if narrow else 8


def block_of(scheme: Scheme, width: int) -> int | None:
    """Weights of one block of the file, 0 where rows have one scale; None where it has no such blocks."""
    if scheme.block(width) == width:
        return 0
    if bits_of(scheme, width) != _HALF_BYTE or scheme.scale_dtype != "bfloat16":
        return None
    return next((block for block in BLOCKS if scheme.group_size % block == 0), None)


def is_kept(decision: Decision) -> bool:
    """Whether the operator of a layer computes with its integers, rather than with floats made of them."""
    scheme = decision.scheme
    if scheme is None or scheme.is_float or not scheme.symmetric:
        return False
    if block_of(scheme, decision.width) is None:
        return False
    if decision.type == "Linear":
        return scheme.activation == "int8-dynamic"
    return decision.type == "Embedding"
