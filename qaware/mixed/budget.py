"""What a search may spend: bits for each weight, bytes of the model, or nats."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qaware.errors import QawareError

_FORMS = "4.5bpw (bits for each quantized weight), bytes=120000 (of the model) or d_nats=0.05"


@dataclass(frozen=True)
class Budget:
    """A limit."""

    kind: str
    """``bpw``, ``bytes`` or ``d_nats``."""
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From the command line's form, e.g. ``4.5bpw``, ``bytes=120000``, ``d_nats=0.05``.

        Raises:
            QawareError: another form, or a value that is not positive.
        """
        kind, _, number = text.partition("=")
        if text.endswith("bpw"):
            kind, number = "bpw", text[: -len("bpw")]
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if kind not in ("bpw", "bytes", "d_nats") or not (0 < value < math.inf):
            raise QawareError(f"budget: {text!r} is not one of {_FORMS}, with a number above 0")
        return cls(kind, value)

    @property
    def text(self) -> str:
        """As it is parsed."""
        return f"{self.value:g}bpw" if self.kind == "bpw" else f"{self.kind}={self.value:.10g}"

    @property
    def slug(self) -> str:
        """For names of recipes, which name files."""
        return f"{self.value:g}bpw" if self.kind == "bpw" else f"{self.value:.10g}-{self.kind}"

    def packed(self, numel: int, rest: int) -> int:
        """Bytes that the quantized weights may take.

        Args:
            numel: number of quantized weights.
            rest: bytes of all that is not quantized.
        """
        return math.floor(self.value * numel / 8 + 1e-9) if self.kind == "bpw" else int(self.value) - rest
