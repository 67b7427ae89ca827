"""Rounding functions of users, by name in a recipe's ``rounding`` like those that come with qaware.

A function is ``function(weight, grid, *, option=default, ...)``:

- ``weight``: float32 (rows, width), what is to be rounded.
- ``grid``: a :class:`qaware.rounding.grid.Grid`, the scales and values that it may become.
- its keyword-only arguments are the options that a recipe may set; each has a default that is a bool, int,
  float or str. One named ``moments`` is no option: with it, calibration batches are looked at, and it gets
  a :class:`qaware.rounding.moments.Moments` of the layer's input, or None for an embedding or a layer that
  never ran.
- it returns a :class:`qaware.rounding.base.Chosen`: values, scales above zero and zero points on the grid.
  Scales below zero need an option ``signed`` that is true, by which runtimes that cannot hold them refuse.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from qaware.errors import QawareError
from qaware.plugins import find_plugin, load_plugin, plugin_names
from qaware.roundings import STEPS, Step

GROUP = "qaware.roundings"
"""Entry points ``name = "package.module:function"``."""
_MOMENTS = "moments"
_TYPES = (bool, int, float, str)

_functions: dict[str, Callable[..., Any]] = {}
_steps: dict[str, type[Step]] = {}


def register_rounding(name: str, function: Callable[..., Any]) -> None:
    """Let recipes say ``rounding: name``, or ``{name: {option: value}}``; later calls replace earlier ones.

    Args:
        name: as a recipe gives it.
        function: see :mod:`qaware.rounding_plugins`.

    Raises:
        QawareError: the name of one that comes with qaware, or a signature that is another.
    """
    if not isinstance(name, str) or not name:
        raise QawareError(f"rounding: {name!r} must be text, to be named in a recipe")
    if name in STEPS:
        raise QawareError(f"rounding: {name!r} comes with qaware; register yours by another name")
    _steps[name] = _make_step(name, function)
    _functions[name] = function


def registered_names() -> list[str]:
    """Of functions that were registered or that an installed package has."""
    return [name for name in dict.fromkeys([*_functions, *plugin_names(GROUP)]) if name not in STEPS]


def find_step(name: str) -> type[Step] | None:
    """What a recipe may say about the function ``name``; None where there is none.

    Raises:
        QawareError: the package that has it cannot be imported.
    """
    if name not in _steps:
        found = find_plugin(GROUP, name)
        if found is None:
            return None
        register_rounding(name, load_plugin(found, "rounding"))
    return _steps[name]


def function_of(name: str) -> Callable[..., Any]:
    """That of a step that :func:`find_step` gave."""
    return _functions[name]


def _make_step(name: str, function: Callable[..., Any]) -> type[Step]:
    if not callable(function):
        raise QawareError(f"rounding: {name!r} is registered with {function!r}; give a function")
    signature = _signature(name, function)
    parameters = list(signature.parameters.values())
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != _MOMENTS]
    wrong = [p.name for p in options if not isinstance(p.default, _TYPES)]
    if len(places) != 2 or wrong:
        raise QawareError(
            f"rounding: {name!r} must be function(weight, grid, *, option=default, ...), each default a "
            f"bool, int, float or str, not {signature}"
        )
    if taken := [p.name for p in options if p.name == "name" or hasattr(Step, p.name)]:
        raise QawareError(f"rounding: {name!r} has an option {taken[0]!r}, which every step has; rename it")
    made: type[Step] = dataclasses.make_dataclass(
        name,
        [(p.name, type(p.default), dataclasses.field(default=p.default)) for p in options],
        bases=(Step,),
        frozen=True,
        namespace={
            "name": name,
            "needs_data": any(p.name == _MOMENTS for p in parameters),
            "__post_init__": _check_options,
        },
    )
    return made


def _signature(name: str, function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError as error:  # of what is written in C
        raise QawareError(f"rounding: {name!r}: {error}; give a function of Python") from error


def _check_options(step: Step) -> None:
    for field in dataclasses.fields(step):
        value, wanted = getattr(step, field.name), type(field.default)
        whole = wanted is float and type(value) is int
        if type(value) is not wanted and not whole:
            raise QawareError(
                f"rounding.{step.name}.{field.name}: {value!r} must be {wanted.__name__}, "
                f"e.g. {field.default!r}"
            )
