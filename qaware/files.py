"""Write files so that a killed run leaves no half file, and name the folder when one cannot be written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qaware.errors import QawareError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed on success, removed on failure.

    Raises:
        QawareError: the folder cannot be written or the disk is full.
    """
    # The process id in front keeps the suffix, which some runtimes read the format from.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        # Where the folder is none, there is nothing to remove, and that is not the error to report.
        with contextlib.suppress(OSError):
            temporary.unlink()


def require_writable(path: Path) -> None:
    """Refuse, before anything expensive, a file that could not be written; its folder is made.

    Raises:
        QawareError: the folder cannot be written, or ``path`` is one.
    """
    if path.is_dir():
        raise QawareError(f"{path}: is a folder; give the path of a file")
    probe = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> QawareError:
    why = error.strerror or error
    return QawareError(f"{path}: cannot be written ({why}); free or choose another folder")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write plain data atomically as indented JSON."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
