"""Experiment files: read, overlaid, overridden from the command line, and turned into objects.

A file is data. A class that it names is imported only where the documentation says that a class goes,
only from lightning, qaware or a package that the user trusts on the command line, and only used when
it is of the kind that belongs there.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from qaware.errors import QawareError
from qaware.reading import read_yaml

Config = dict[str, Any]
T = TypeVar("T")

KNOWN_PACKAGES = ("qaware", "lightning")
CLASS_PLACES = ("model", "data", "trainer.callbacks", "trainer.logger")
"""Where a file may name a class."""


def load_config(arguments: Sequence[str], trusted: Sequence[str] = ()) -> Config:
    """Merge files and ``key=value`` overrides, later ones winning.

    Args:
        arguments: paths of YAML files and overrides such as ``data.init_args.batch_size=8`` or
            ``quantize+={recipe: float16}``.
        trusted: packages besides lightning and qaware whose classes files may name.

    Raises:
        QawareError: no file, an unreadable one, or a class where none may be named.
    """
    config: Config = {}
    for argument in arguments:
        if "=" in argument:
            key, _, text = argument.partition("=")
            _override(config, key, text)
        else:
            data = read_yaml(Path(argument))
            if not isinstance(data, Mapping):
                raise QawareError(f"{argument}: must be a mapping of keys to values")
            config = _merge(config, data)
    if not config:
        raise QawareError("run: give an experiment file, e.g. experiments/quickstart.yaml")
    _refuse_classes(config, "", (*KNOWN_PACKAGES, *trusted))
    return config


def _merge(base: Config, top: Mapping[str, Any]) -> Config:
    """Mappings merge key by key; a new class_path drops the other class's arguments."""
    merged = dict(base)
    if "class_path" in top and top["class_path"] != base.get("class_path"):
        merged.pop("init_args", None)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _override(config: Config, key: str, text: str) -> None:
    append = key.endswith("+")
    *parents, last = key.rstrip("+").split(".")
    place = config
    for name in parents:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise QawareError(f"{key}: {name!r} is not a mapping, so nothing inside it can be set")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise QawareError(f"{key}: {text!r} is not valid YAML ({' '.join(str(error).split())})") from error
    place[last] = [*(place.get(last) or []), value] if append else value


def _refuse_classes(value: Any, place: str, packages: Iterable[str]) -> None:
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if "class_path" in value and place not in CLASS_PLACES:
            raise QawareError(f"{place}.class_path: a class may only be named in {', '.join(CLASS_PLACES)}")
        if path is not None and str(path).partition(".")[0] not in packages:
            raise QawareError(
                f"{place}.class_path: {path!r} is not in {', '.join(packages)}; an experiment file runs no "
                f"other code unless you allow it with --trust {str(path).partition('.')[0]}"
            )
        for key, item in value.items():
            _refuse_classes(item, f"{place}.{key}".lstrip("."), packages)
    elif isinstance(value, list):
        for item in value:
            _refuse_classes(item, place, packages)


def build(place: str, spec: Any, kind: type[T]) -> T:
    """Instantiate ``{class_path: ..., init_args: {...}}``, with the arguments checked by jsonargparse.

    Args:
        place: key of the spec, for messages.
        spec: plain data, already through :func:`load_config`.
        kind: what the class must be a subclass of.

    Raises:
        QawareError: no such class, another kind of class, or arguments that do not fit.
    """
    if not isinstance(spec, Mapping) or set(spec) - {"class_path", "init_args"} or "class_path" not in spec:
        raise QawareError(f"{place}: {spec!r} must be {{class_path: ..., init_args: {{...}}}}")
    cls = _find_class(place, str(spec["class_path"]), kind)
    instance: T = cls(**arguments_of(cls, f"{place}.init_args", spec.get("init_args") or {}))
    return instance


def arguments_of(
    cls: type, place: str, given: Mapping[str, Any], skip: set[str] | None = None
) -> dict[str, Any]:
    """All arguments of a class, with those ``given`` checked against its signature.

    Args:
        cls: whose ``__init__`` tells the names and types.
        place: key of ``given``, for messages.
        given: plain data.
        skip: arguments that are passed in another way.

    Raises:
        QawareError: an unknown name or a wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None, fail_untyped=False, skip=skip)
    return parse(parser, place, given)


def _find_class(place: str, path: str, kind: type) -> Any:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise QawareError(f"{place}.class_path: {path!r} cannot be imported ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise QawareError(f"{place}.class_path: {path!r} is not a {kind.__module__}.{kind.__name__}")
    return cls


def parse(parser: ArgumentParser, place: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` through a jsonargparse parser: unknown keys and wrong types become one line.

    Raises:
        QawareError: names the key, as jsonargparse does.
    """
    try:
        namespace = parser.instantiate(parser.parse_object(dict(data), defaults=True))
    except QawareError:
        raise
    except Exception as error:  # jsonargparse raises many kinds; all of them are about the given data
        raise QawareError(f"{place}: {' '.join(str(error).split())}") from error
    return dict(vars(namespace))
