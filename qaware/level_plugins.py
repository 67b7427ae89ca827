"""Sets of values that a weight may take, by name in a scheme's ``levels`` like those that come with qaware.

A set is given as the whole numbers that stand for its values, which are these times the scale: the levels
of FP4 (E2M1), 0, 0.5, 1, 1.5, 2, 3, 4 and 6 of either sign, are on half the scale ``(-12, -8, -6, -4, -3, -2,
-1, 0, 1, 2, 3, 4, 6, 8, 12)``. So whatever holds integers of that size holds them, unchanged.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from qaware.errors import QawareError
from qaware.plugins import find_plugin, load_plugin, plugin_names

GROUP = "qaware.levels"
"""Entry points ``name = "package.module:NUMBERS"``."""
BUILTIN = ("all", "ternary", "stretched")
_LARGEST = 127
"""Kernels with integer activations leave out -128: two of its products do not fit in 16 bits."""

_sets: dict[str, tuple[int, ...]] = {}


def register_levels(name: str, integers: Sequence[int]) -> None:
    """Let schemes say ``levels: name``; a second call must give the same numbers.

    Args:
        name: as a recipe gives it.
        integers: 2 to 255 whole numbers from -127 to 127, increasing, some below zero and some above.

    Raises:
        QawareError: the name of one that comes with qaware or has other numbers, or not such numbers.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w.+-]*", name):
        raise QawareError(f"levels: {name!r} must be a letter, then letters, digits, '-', '_', '.'")
    if name in BUILTIN:
        raise QawareError(f"levels: {name!r} comes with qaware; register yours by another name")
    made = _checked(name, integers)
    # Schemes are compared by the name: one that changes what it means would make two grids equal.
    if _sets.setdefault(name, made) != made:
        raise QawareError(f"levels: {name!r} has other numbers already; register these by another name")


def level_names() -> list[str]:
    """Of sets that were registered or that an installed package has; those that come with qaware win over
    others of their name."""
    return [name for name in dict.fromkeys([*_sets, *plugin_names(GROUP)]) if name not in BUILTIN]


def find_levels(name: str) -> tuple[int, ...] | None:
    """The numbers of the set ``name``, increasing; None where there is none.

    Raises:
        QawareError: the package that has it cannot be imported, or gives no such numbers.
    """
    if name not in _sets:
        found = find_plugin(GROUP, name)
        if found is None:
            return None
        register_levels(name, load_plugin(found, "levels"))
    return _sets[name]


def _checked(name: str, integers: object) -> tuple[int, ...]:
    given = tuple(integers) if isinstance(integers, (list, tuple, range)) else ()
    whole = len(given) > 1 and all(type(value) is int for value in given)
    if not whole or any(a >= b for a, b in itertools.pairwise(given)):
        raise QawareError(
            f"levels: {name!r} is {integers!r}; give whole numbers, increasing, as a list or tuple, "
            "e.g. (-4, -2, -1, 0, 1, 2, 4)"
        )
    if given[0] < -_LARGEST or given[-1] > _LARGEST:
        raise QawareError(
            f"levels: {name!r} goes from {given[0]} to {given[-1]}; kernels hold -{_LARGEST} to {_LARGEST}"
        )
    if given[0] >= 0 or given[-1] <= 0:
        raise QawareError(
            f"levels: {name!r} goes from {given[0]} to {given[-1]}; weights of both signs need levels below "
            "and above zero"
        )
    return given
