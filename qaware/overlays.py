"""Overlays: YAML files that add a callback to the configuration of an existing ``LightningCLI`` project."""

from __future__ import annotations

from importlib import resources

from qaware.errors import QawareError

_FOLDER = resources.files("qaware.recipes").joinpath("overlays")


def overlay_names() -> list[str]:
    """Names of the overlays that come with the package."""
    return sorted(file.name[: -len(".yaml")] for file in _FOLDER.iterdir() if file.name.endswith(".yaml"))


def read_overlay(name: str) -> str:
    """The text of an overlay, with the comments that explain its keys.

    Raises:
        QawareError: there is none of that name.
    """
    if name not in overlay_names():
        raise QawareError(f"overlay: {name!r} is not one of {', '.join(overlay_names())}")
    return _FOLDER.joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def describe_overlay(name: str) -> str:
    """What an overlay is for: its first line."""
    return read_overlay(name).splitlines()[0].removeprefix("# ")
