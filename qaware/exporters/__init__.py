"""One file a runtime. Built-ins are listed by hand; others come from the entry-point group
``qaware.exporters`` (name = "package.module:ExporterClass")."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from qaware.errors import QawareError

if TYPE_CHECKING:
    from qaware.exporters.base import Exporter

BUILTIN = {
    "executorch": "qaware.exporters.executorch:ExecuTorchExporter",
    "aoti": "qaware.exporters.aoti:AOTIExporter",
    "tract": "qaware.exporters.tract:TractExporter",
}


def exporter_names() -> list[str]:
    """Runtimes that can be named in an experiment."""
    return list(dict.fromkeys([*BUILTIN, *(e.name for e in entry_points(group="qaware.exporters"))]))


def get_exporter(name: str) -> Exporter:
    """The exporter for a runtime, by name. Importing it does not import the runtime's package.

    Raises:
        QawareError: unknown name, or a plugin that cannot be imported.
    """
    target = BUILTIN.get(name)
    if target is None:
        plugin = next((e for e in entry_points(group="qaware.exporters") if e.name == name), None)
        if plugin is None:
            raise QawareError(f"runtime: {name!r} is not one of {', '.join(exporter_names())}")
        try:
            exporter: Exporter = plugin.load()()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise QawareError(f"{name}: plugin cannot be loaded from {plugin.value} ({why})") from error
        return exporter
    module, _, attribute = target.partition(":")
    built: Exporter = getattr(importlib.import_module(module), attribute)()
    return built
