"""What rounding did to each layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RoundedLayer:
    """One quantized layer. None is what is not known."""

    name: str
    method: str
    """The steps, e.g. ``awq+rtn``."""
    error: float | None = None
    """Squared error of its output, on the calibration data, as a share of the output's square; where no data
    was used, of its weight. Biases aside."""
    rtn_error: float | None = None
    """The same of rounding to nearest, with the same input."""
    tie: str = ""
    """Which layer it shares its integers with, or was parted from."""
    note: str = ""
    """What was done in another way than asked for, and why."""


@dataclass(frozen=True)
class RoundingReport:
    """All quantized layers, in the order in which they were rounded."""

    layers: tuple[RoundedLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"layers": [dataclasses.asdict(layer) for layer in self.layers]}
