"""Numeric tolerance by name, for a parity check that is stricter or looser than a runtime's own.

The names and numbers are those of tract's ``Approximation`` for float32 (``data/src/tensor.rs``), which
torch_to_nnef's ``TractCheckTolerance`` passes on: every value of an artifact may be
``atol + rtol * |expected|`` away from what the converted model gives, but for a share of outliers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qaware.errors import QawareError

DEFAULT = "default"
"""A runtime's own :class:`qaware.exporters.base.Tolerance`."""


@dataclass(frozen=True)
class Level:
    """How far single values may be from the converted model's."""

    atol: float
    """Whatever the value's size."""
    rtol: float
    """As a share of the absolute value that is expected."""
    outliers: float = 0.0
    """Share of the values that may be further off."""

    def beyond(self, expected: Tensor, got: Tensor) -> float:
        """Share of the values, two tensors of one shape, that are further off; NaN always is."""
        near = (expected - got).abs() <= self.atol + self.rtol * expected.abs()
        return float((~near).double().mean())


LEVELS = {
    "exact": Level(0.0, 0.0),
    "close": Level(1e-7, 1e-7),
    "approximate": Level(1e-4, 5e-4),
    "very": Level(5e-2, 1e-2),
    "super": Level(0.1, 0.05, 1e-4),
    "ultra": Level(0.2, 0.1, 5e-4),
}


def require_level(parity: object) -> str:
    """``parity`` itself.

    Raises:
        QawareError: it is no name of a level.
    """
    if parity != DEFAULT and parity not in LEVELS:
        raise QawareError(f"parity: {parity!r} is not one of {', '.join([DEFAULT, *LEVELS])}")
    return str(parity)
