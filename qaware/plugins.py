"""What other packages add by name, through entry points ``name = "package.module:object"``."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qaware.errors import QawareError


def plugin_names(group: str) -> list[str]:
    """Names that installed packages have in ``group``, each once; nothing is imported."""
    return list(dict.fromkeys(entry.name for entry in entry_points(group=group)))


def find_plugin(group: str, name: str) -> EntryPoint | None:
    """The entry point ``name`` of ``group``, not imported; None where no installed package has it."""
    return next((entry for entry in entry_points(group=group) if entry.name == name), None)


def load_plugin(entry: EntryPoint, what: str) -> Any:
    """The object that an entry point names.

    Args:
        entry: of :func:`find_plugin`.
        what: it is, for the message, e.g. ``rounding``.

    Raises:
        QawareError: its package cannot be imported, or has no such object.
    """
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # a script without a main guard ends the process
        why = f"{type(error).__name__}: {error}"
        raise QawareError(f"{what}: {entry.name!r} cannot be loaded from {entry.value} ({why})") from error
