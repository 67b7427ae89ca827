"""Recipes of other installed packages, by name wherever a recipe is, and in the list of ``qaware recipes``.

Those that come with qaware win over others of their name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qaware.errors import QawareError
from qaware.plugins import find_plugin, load_plugin, plugin_names
from qaware.shipped import preset_names, recipe_names

if TYPE_CHECKING:
    from qaware.recipe import Recipe

GROUP = "qaware.recipes"
"""Entry points ``name = "package.module:RECIPE"``, a :class:`qaware.Recipe` or a mapping that is one."""


def packaged_names() -> list[str]:
    """Names of the recipes that other installed packages have; nothing is imported."""
    return sorted({*plugin_names(GROUP)} - {*recipe_names(), *preset_names()})


def read_packaged(name: str) -> Recipe | Mapping[str, Any] | None:
    """The recipe ``name`` of another package as that has it, or None.

    Raises:
        QawareError: the package cannot be imported, or has something else there.
    """
    entry = find_plugin(GROUP, name)
    if entry is None:
        return None
    from qaware.recipe import Recipe

    found = load_plugin(entry, "recipe")
    if isinstance(found, (Recipe, Mapping)):
        return found
    kind = type(found).__name__
    raise QawareError(
        f"recipe: {name!r} is of type {kind} ({entry.value}); give a qaware.Recipe or a mapping"
    )
