"""One file a runtime. Built-ins are listed by hand; others come from the entry-point group
``qaware.exporters`` (name = "package.module:ExporterClass")."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qaware.errors import QawareError
from qaware.plugins import find_plugin, load_plugin, plugin_names

if TYPE_CHECKING:
    from qaware.exporters.base import Exporter

BUILTIN = {
    "executorch": "qaware.exporters.executorch:ExecuTorchExporter",
    "aoti": "qaware.exporters.aoti:AOTIExporter",
    "tract": "qaware.exporters.tract:TractExporter",
    "onnxruntime": "qaware.exporters.onnxruntime:OnnxRuntimeExporter",
    "openvino": "qaware.exporters.openvino:OpenVINOExporter",
    "litert": "qaware.exporters.litert:LiteRTExporter",
    "gguf": "qaware.exporters.gguf:GGUFExporter",
    "mlx": "qaware.exporters.mlx:MLXExporter",
    "onnxruntime-genai": "qaware.exporters.genai:GenAIExporter",
}
_GROUP = "qaware.exporters"


def exporter_names() -> list[str]:
    """Runtimes that can be named in an experiment."""
    return list(dict.fromkeys([*BUILTIN, *plugin_names(_GROUP)]))


def runtime_name(named: str | Mapping[str, Any]) -> str:
    """``aoti`` of ``"aoti"`` or of ``{"aoti": {"cache_length": 512}}``.

    Raises:
        QawareError: neither a name nor a name with its options.
    """
    if isinstance(named, str):
        return named
    if isinstance(named, Mapping) and len(named) == 1:
        ((name, options),) = named.items()
        if isinstance(name, str) and isinstance(options, Mapping):
            return name
    raise QawareError(f"export: {named!r} must be a runtime, or a runtime and its options: {{aoti: {{...}}}}")


def get_exporter(named: str | Mapping[str, Any]) -> Exporter:
    """The exporter for a runtime, by name, or as ``{name: options}`` with options of its own.

    Importing it does not import the runtime's package.

    Raises:
        QawareError: unknown name or option, an option's value that is none, or a plugin that cannot be
            imported or is no exporter of its name.
    """
    name = runtime_name(named)
    made = _exporter_class(name)
    options = {} if isinstance(named, str) else dict(named[name])
    known = [key for key in inspect.signature(made).parameters if key not in ("args", "kwargs")]
    if unknown := sorted(set(options) - set(known)):
        offered = f"its options are {', '.join(known)}" if known else "it has no options"
        raise QawareError(f"export.{name}.{unknown[0]}: is no option of this runtime; {offered}")
    try:
        exporter: Exporter = made(**options)
    except QawareError:
        raise
    except (TypeError, ValueError) as error:
        raise QawareError(f"export.{name}: {made.__name__} cannot be made ({error})") from error
    _require_length(name, exporter.cache_length)
    return exporter


def get_exporters(named: Sequence[str | Mapping[str, Any]]) -> list[Exporter]:
    """One for each entry of ``export``.

    Raises:
        QawareError: no list, one runtime twice, or as :func:`get_exporter`.
    """
    if isinstance(named, (str, Mapping)):
        raise QawareError(f"export: {named!r} must be a list, e.g. [{named}]")
    names = [runtime_name(entry) for entry in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise QawareError(f"export: {twice[0]} is there twice; give other options in an entry of their own")
    return [get_exporter(entry) for entry in named]


def _exporter_class(name: str) -> Any:
    if target := BUILTIN.get(name):
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)
    plugin = find_plugin(_GROUP, name)
    if plugin is None:
        raise QawareError(f"runtime: {name!r} is not one of {', '.join(exporter_names())}")
    return _require_exporter(name, plugin.value, load_plugin(plugin, "runtime"))


def _require_exporter(name: str, value: str, found: Any) -> Any:
    """A plugin's class; what it writes is loaded by the name in it, in a process that knows no other."""
    from qaware.exporters.base import Exporter

    if not (isinstance(found, type) and issubclass(found, Exporter)):
        raise QawareError(f"runtime: {name!r} is {found!r} ({value}); give a class of qaware's Exporter")
    own = getattr(found, "name", None)
    if own != name:
        raise QawareError(f"runtime: {name!r} is an exporter with name = {own!r} ({value}); make them one")
    return found


def _require_length(name: str, length: Any) -> None:
    if length is not None and (type(length) is not int or length < 1):
        raise QawareError(
            f"export.{name}.cache_length: {length!r} must be a number of tokens, 1 or more, or null"
        )
