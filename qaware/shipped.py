"""The recipes that come with the package: our own, and the presets of other tools."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from importlib.abc import Traversable

_SUFFIX = ".yaml"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return _names(_own())


def preset_names() -> list[str]:
    """Names of the recipes that are those of other tools; see ``docs/recipes-from-elsewhere.md``."""
    return _names(_presets())


def read_shipped(name: str) -> Any:
    """Plain data of the recipe or preset ``name``, which is one of these."""
    folder = _own() if name in recipe_names() else _presets()
    return yaml.safe_load(folder.joinpath(f"{name}{_SUFFIX}").read_text(encoding="utf-8"))


def _own() -> Traversable:
    return resources.files("qaware.recipes")


def _presets() -> Traversable:
    return _own().joinpath("presets")


def _names(folder: Traversable) -> list[str]:
    return sorted(f.name[: -len(_SUFFIX)] for f in folder.iterdir() if f.name.endswith(_SUFFIX))
