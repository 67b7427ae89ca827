"""How one layer is quantized. The only place where bit ranges live; imports nothing heavy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qaware.errors import QawareError
from qaware.level_plugins import BUILTIN, find_levels, level_names

ACTIVATIONS = ("none", "int8-dynamic", "int8-static")
SCALE_DTYPES = ("float32", "bfloat16", "float16")
OBSERVERS = ("minmax", "moving-average", "histogram", "percentile", "mse")
FLOAT16_BITS = 16
_TERNARY_BITS = 2
_STRETCHED_BITS = 3
_DEFAULTS = (0, "none", True, "float32")


@dataclass(frozen=True)
class Scheme:
    """The quantization of one layer's weight and of the activation that enters it."""

    bits: int
    """Bits of a weight: 1 to 8 for integers, 16 for float16."""
    group_size: int = 0
    """Consecutive weights of a row (2 or more) that share one scale; 0: one scale for each output channel."""
    activation: str = "none"
    """``none`` (weight-only), ``int8-dynamic`` (asymmetric, a range for each token, measured at run
    time) or ``int8-static`` (asymmetric, one calibrated range for the tensor)."""
    symmetric: bool = True
    """Whether zero is the integer 0. Asymmetric weights carry a zero point for each scale."""
    scale_dtype: str = "float32"
    """The precision that scales are rounded to, in training as in the artifact. ``bfloat16`` is what
    XNNPACK stores for groups and, above 2**-17, is exact in tract's float16 too."""
    observer: str = "minmax"
    """How the range of an ``int8-static`` activation is found: ``minmax``, all that was seen;
    ``moving-average``, of the batches' ranges; and, in calibration only, not QAT, ``histogram`` and ``mse``,
    the part of it whose rounding costs least, or ``percentile``, without the outermost values."""
    per_tensor: bool = False
    """One scale for the whole weight, as 8-bit kernels without a scale for each channel need. For
    ``int8-static`` only."""
    levels: str = "all"
    """Which values of the width are used: ``all``; ``ternary``, of 2 bits -1, 0 and 1 times the scale;
    ``stretched``, for 1 to 3 bits as many levels below zero as above and none at zero, e.g. -1.5, -0.5, 0.5
    and 1.5 times the scale (stretched elastic quantization, ParetoQ, Liu et al. 2025, arXiv:2502.02631); or a
    set that was registered, see :mod:`qaware.level_plugins`."""

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not (1 <= self.bits <= 8 or self.bits == FLOAT16_BITS):
            raise QawareError(f"bits: {self.bits!r} is not a weight width; use 1 to 8, or 16 for float16")
        if not _is_int(self.group_size) or self.group_size < 0 or self.group_size == 1:
            raise QawareError(f"group_size: {self.group_size!r} must be 0 (one scale per channel), 2 or more")
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _one_of("observer", self.observer, OBSERVERS)
        if not isinstance(self.symmetric, bool):
            raise QawareError(f"symmetric: {self.symmetric!r} must be true or false")
        if (
            self.is_float
            and (self.group_size, self.activation, self.symmetric, self.scale_dtype) != _DEFAULTS
        ):
            raise QawareError("bits: 16 is float16, which has no group_size, activation, zero point or scale")
        if self.observer != "minmax" and self.activation != "int8-static":
            raise QawareError(
                f"observer: {self.observer!r} calibrates a static activation; "
                f"activation is {self.activation!r}, use int8-static or leave observer out"
            )

        if not isinstance(self.per_tensor, bool):
            raise QawareError(f"per_tensor: {self.per_tensor!r} must be true or false")
        if self.per_tensor and (self.group_size or self.activation != "int8-static"):
            raise QawareError(
                "per_tensor: true is for activation: int8-static without group_size; "
                "elsewhere a scale for each channel costs nothing, so leave per_tensor out"
            )
        self._check_levels()

    def _check_levels(self) -> None:
        if self.levels == "all":
            return
        widths = self._widths()
        if self.bits not in widths:
            legal = " or ".join(map(str, widths))
            raise QawareError(
                f"levels: {self.levels!r} is for bits: {legal}, not {self.bits}; leave levels out"
            )
        if not self.symmetric:
            raise QawareError(f"levels: {self.levels!r} has no zero point; use symmetric: true")

    def _widths(self) -> tuple[int, ...]:
        """The ``bits`` that ``levels`` is for."""
        if self.levels == "ternary":
            return (_TERNARY_BITS,)
        if self.levels == "stretched":
            return tuple(range(1, _STRETCHED_BITS + 1))
        if self.level_set is None:
            known = ", ".join([*BUILTIN, *level_names()])
            raise QawareError(
                f"levels: {self.levels!r} is not one of {known}; qaware.register_levels adds others"
            )
        return ((len(self.level_set) - 1).bit_length(),)

    @cached_property
    def level_set(self) -> tuple[int, ...] | None:
        """The integers of levels that were registered, increasing; None for those that come with qaware.
        Found once, so that a process to which the scheme is sent need not know them."""
        named = self.levels not in BUILTIN and isinstance(self.levels, str)
        return find_levels(self.levels) if named else None

    @property
    def is_float(self) -> bool:
        """Whether the weight is stored as float16 rather than as integers."""
        return self.bits == FLOAT16_BITS

    @property
    def is_stretched(self) -> bool:
        """Whether the levels lie between the integers."""
        return self.levels == "stretched"

    @property
    def stored_bits(self) -> int:
        """Bits of the integers that stand for the levels. Those of stretched levels are odd, on half the
        scale (-3, -1, 1 and 3 for 2 bits), so any kernel that has one more bit holds them; those of a
        registered set are any, e.g. 5 bits for the 4 of FP4."""
        if self.level_set is not None:
            return max((-self.level_set[0] - 1).bit_length(), self.level_set[-1].bit_length()) + 1
        return self.bits + 1 if self.is_stretched else self.bits

    @property
    def code_bits(self) -> int:
        """Bits of a weight in a file that counts its integers from the smallest one on, stretched ones, which
        are odd, by twos."""
        return self.bits if self.level_set is None else self.stored_bits

    @property
    def is_mirrored(self) -> bool:
        """Whether there are the same levels below zero as above it; else those of a scale below zero are
        others."""
        if self.level_set is not None:
            return self.level_set == tuple(-value for value in reversed(self.level_set))
        low, high = self.range
        return low == -high

    @property
    def is_evenly_spaced(self) -> bool:
        """Whether the levels are all whole numbers of a range."""
        return self.level_set is None and not self.is_stretched

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer that stands for a weight, e.g. (-8, 7) for 4 bits, (-1, 1) for ternary
        and (-3, 3) for 2 stretched bits."""
        if self.level_set is not None:
            return self.level_set[0], self.level_set[-1]
        if self.levels == "ternary":
            return -1, 1
        if self.is_stretched:
            return -(2**self.bits - 1), 2**self.bits - 1
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def is_static(self) -> bool:
        """Whether the activations are integers with a calibrated range."""
        return self.activation == "int8-static"

    @property
    def weight(self) -> Scheme:
        """This scheme without its activation part: two layers with equal ones can share integers."""
        return dataclasses.replace(self, activation="none", observer="minmax", per_tensor=False)

    @property
    def label(self) -> str:
        """Short form for tables, e.g. ``int4 g32 + int8-dynamic``."""
        if self.is_float:
            return "float16"
        unit = f"g{self.group_size}" if self.group_size else "tensor" if self.per_tensor else "channel"
        width = {"all": f"int{self.bits}", "stretched": f"int{self.bits} stretched"}.get(
            self.levels, self.levels
        )
        grid = f"{width} {unit}"
        grid += "" if self.symmetric else " asym"
        if self.activation == "none":
            return grid
        return f"{grid} + {self.activation}" + ("" if self.observer == "minmax" else f" {self.observer}")

    def block(self, width: int) -> int:
        """Weights that share one scale in a row of ``width`` weights."""
        return self.group_size or width

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, ``bits`` always."""
        fields = dataclasses.fields(self)
        return {f.name: v for f in fields if (v := getattr(self, f.name)) != f.default}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(key: str, value: object, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise QawareError(f"{key}: {value!r} is not one of {', '.join(legal)}")
