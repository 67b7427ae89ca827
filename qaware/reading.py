"""Plain data from YAML and JSON, with errors of one line that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from qaware.errors import QawareError


def read_yaml(path: Path) -> Any:
    """Plain data from a YAML file, loaded safely; a missing or malformed file is a QawareError."""
    try:
        return yaml.safe_load(_read(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QawareError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from error


def read_json(path: Path) -> Any:
    """Plain data from a JSON file; a missing or malformed file is a QawareError."""
    try:
        return parse_json(_read(path), str(path))
    except UnicodeDecodeError as error:
        raise QawareError(f"{path}: is not valid JSON ({error})") from error


def parse_json(text: str, where: str) -> Any:
    """Plain data from JSON; other text is a QawareError that names ``where`` it comes from."""
    try:
        return json.loads(text)
    except ValueError as error:
        example = '{"linear:a8w4dq": {"groupsize": 256}}'
        raise QawareError(f"{where}: is not valid JSON ({error}); e.g. {example}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise QawareError(f"{path}: cannot be read ({error.strerror})") from error
