"""The steps of a recipe's rounding and their options: what is said in a recipe, not how it is done.

A rounding is one name, or a list of steps in the order in which they run: first what folds scales into other
layers (``smoothquant``, ``awq``), then one that chooses the integers, then ``bias-correction``.

With calibration data take ``gptq`` as it is, without any ``mse``. Share of the loss of round to nearest, in
nats, that each wins back on a language model of 0.26 million parameters, linear layers in groups of 32 with
bfloat16 scales: at 4 bits percentile 10, hqq 17, mse 26, gptq 68 and gptq with ``signed`` 70 percent; at 3
bits hqq 21, mse 34, gptq 70 and 77.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qaware.errors import QawareError
from qaware.scheme import Scheme


@dataclass(frozen=True)
class Step:
    """One step; its fields are its options."""

    name: ClassVar[str]
    stage: ClassVar[int] = 1
    """0: folds scales into other layers, 1: chooses integers, 2: corrects afterwards."""
    needs_data: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The name and the options that are not as they are by default, e.g. ``gptq damping=0.05``."""
        fields = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        return " ".join([self.name, *(f"{f.name}={getattr(self, f.name)}".lower() for f in fields)])

    def refuse(self, scheme: Scheme) -> str | None:
        """Why it chooses no integers of ``scheme``, with the way out, or None."""
        return None


@dataclass(frozen=True)
class Rtn(Step):
    """Round to nearest on the scale of the largest absolute value."""

    name: ClassVar[str] = "rtn"


@dataclass(frozen=True)
class Mse(Step):
    """Round to nearest on the scale with the smallest squared error, found by a grid search."""

    name: ClassVar[str] = "mse"
    candidates: int = 64
    """Scales that are tried for each group of weights."""
    signed: bool = False
    """Try scales below zero too, which turn the longer side of a range such as -8 to 7 to where it is needed.
    tract's Q4_0 holds them; XNNPACK wants scales above zero."""

    def __post_init__(self) -> None:
        _at_least("rounding.mse.candidates", self.candidates, 2)
        _is_bool("rounding.mse.signed", self.signed)


@dataclass(frozen=True)
class Percentile(Step):
    """Round to nearest on the scale of a percentile of the absolute values; larger ones are clipped."""

    name: ClassVar[str] = "percentile"
    share: float = 0.99
    """Of the weights of a group that are within the range, e.g. 0.99."""

    def __post_init__(self) -> None:
        _between("rounding.percentile.share", self.share, 0.5, 1.0)


@dataclass(frozen=True)
class Q40(Step):
    """Round as torch_to_nnef does for tract's Q4_0: on float16 scales below zero, halves up."""

    name: ClassVar[str] = "q4-0"
    signed: ClassVar[bool] = True
    share: float = 1.0
    """Of the weights of a group that are within the range; 1: all of them."""

    def __post_init__(self) -> None:
        _between("rounding.q4-0.share", self.share, 0.5, 1.0)

    def refuse(self, scheme: Scheme) -> str | None:
        """Only symmetric integers of all levels with float16 scales."""
        fits = scheme.symmetric and scheme.levels == "all" and scheme.scale_dtype == "float16"
        if fits or scheme.is_float:
            return None
        return f"q4-0 is for symmetric integers with scale_dtype: float16, not {scheme.label}; use mse"


@dataclass(frozen=True)
class Hqq(Step):
    """Half-quadratic quantization: the scale that is best where few weights may be far off."""

    name: ClassVar[str] = "hqq"
    iterations: int = 20

    def __post_init__(self) -> None:
        _at_least("rounding.hqq.iterations", self.iterations, 1)


@dataclass(frozen=True)
class Gptq(Step):
    """Column by column, each rounding error made up for by the columns that are still to come."""

    name: ClassVar[str] = "gptq"
    needs_data: ClassVar[bool] = True
    damping: float = 0.1
    """Share of the mean diagonal that is added to the Hessian's diagonal."""
    act_order: bool = False
    """Columns with the largest inputs first. Scales are then those of the weight as it was; else they are
    found when a group's turn comes, with the errors that it has taken over."""
    block: int = 128
    """Columns whose errors are passed on at once."""
    scales: str = "mse"
    """How a group's scale is found: ``mse`` or ``minmax``."""
    signed: bool = False
    """Try scales below zero too; see :class:`Mse`."""
    polish: int = 3
    """How often each integer is looked at again when the others are known, with the scales fitted in
    between."""
    correct: bool = True
    """Match the float model's output rather than that of the float weight for the inputs that earlier
    rounding left. Holds the float weights of a block meanwhile, and runs that in float too."""

    def __post_init__(self) -> None:
        _between("rounding.gptq.damping", self.damping, 0.0, 1.0)
        _at_least("rounding.gptq.block", self.block, 1)
        _one_of("rounding.gptq.scales", self.scales, ("mse", "minmax"))
        for key in ("act_order", "signed", "correct"):
            _is_bool(f"rounding.gptq.{key}", getattr(self, key))
        _at_least("rounding.gptq.polish", self.polish, 0)


@dataclass(frozen=True)
class Awq(Step):
    """Activation-aware scales: channels with large inputs get finer weights."""

    name: ClassVar[str] = "awq"
    stage: ClassVar[int] = 0
    needs_data: ClassVar[bool] = True
    candidates: int = 20
    """Exponents from 0 to 1 that are tried for each group of layers."""

    def __post_init__(self) -> None:
        _at_least("rounding.awq.candidates", self.candidates, 2)


@dataclass(frozen=True)
class SmoothQuant(Step):
    """Moves the outliers of activations into the weights, where they do less harm."""

    name: ClassVar[str] = "smoothquant"
    stage: ClassVar[int] = 0
    needs_data: ClassVar[bool] = True
    alpha: float = 0.5
    """How much of an outlier moves, 0 (nothing) to 1 (all of it)."""

    def __post_init__(self) -> None:
        _between("rounding.smoothquant.alpha", self.alpha, 0.0, 1.0)


@dataclass(frozen=True)
class BiasCorrection(Step):
    """Adds to a layer's bias what its rounding errors take from the mean of its output."""

    name: ClassVar[str] = "bias-correction"
    stage: ClassVar[int] = 2
    needs_data: ClassVar[bool] = True


STEPS: dict[str, type[Step]] = {
    step.name: step for step in (Rtn, Mse, Percentile, Q40, Hqq, Gptq, Awq, SmoothQuant, BiasCorrection)
}
ROUNDINGS = tuple(STEPS)


def parse_steps(rounding: Any) -> tuple[Step, ...]:
    """The steps of a recipe's ``rounding``: a name, or a list of names and ``{name: {option: value}}``.

    Exactly one of them chooses the integers; where none is named it is ``rtn``.

    Raises:
        QawareError: an unknown step or option (the nearest is suggested), an illegal value or order.
    """
    given = [rounding] if isinstance(rounding, (str, Mapping)) else rounding
    if not isinstance(given, Sequence) or not given:
        raise QawareError(f"rounding: {rounding!r} must be a name such as gptq, or a list of steps")
    steps = tuple(_step(item) for item in given)
    choosers = [step.name for step in steps if step.stage == 1]
    if len(choosers) > 1:
        raise QawareError(f"rounding: {' and '.join(choosers)} both choose the integers; keep one")
    if len({step.name for step in steps}) < len(steps):
        raise QawareError(f"rounding: {rounding!r} names a step twice")
    if not choosers:
        steps = (*steps, Rtn())
    ordered = tuple(sorted(steps, key=lambda step: step.stage))
    if choosers and ordered != steps:
        right = ", ".join(step.name for step in ordered)
        raise QawareError(f"rounding: the steps run in the order given, which must be [{right}]")
    return ordered


def _step(item: Any) -> Step:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise QawareError(f"rounding: {item!r} must be a name, or one name with its options")
    ((name, options),) = item.items()
    kind = STEPS.get(name) or _registered(name)
    known = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(options or {}, Mapping):
        raise QawareError(f"rounding.{name}: {options!r} must be a mapping of options")
    for key in options or {}:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise QawareError(
                f"rounding.{name}: unknown option {key!r}; {hint}known: {', '.join(known) or 'none'}"
            )
    return kind(**(options or {}))


def _registered(name: object) -> type[Step]:
    """A user's."""
    from qaware.rounding_plugins import find_step, registered_names

    kind = find_step(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join([*ROUNDINGS, *registered_names()])
        raise QawareError(f"rounding: {name!r} is not one of {known}; qaware.register_rounding adds others")
    return kind


def _at_least(key: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise QawareError(f"{key}: {value!r} must be a whole number, {least} or more")


def _between(key: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise QawareError(f"{key}: {value!r} must be a number from {low} to {high}")


def _one_of(key: str, value: object, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise QawareError(f"{key}: {value!r} is not one of {', '.join(legal)}")


def _is_bool(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise QawareError(f"{key}: {value!r} must be true or false")
