"""Write files and folders so that a killed run leaves no half one, and name what cannot be written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qaware.errors import QawareError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` for a file or a folder; renamed on success, removed on failure.

    Raises:
        QawareError: the folder around it cannot be written, the disk is full, or ``path`` is a folder where a
            file was written, or the reverse.
    """
    # The process id in front keeps the suffix, which some runtimes read the format from.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # of a killed process with the same id
        yield temporary
        replace(temporary, path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        _remove(temporary)


def replace(new: Path, path: Path) -> None:
    """Rename a file over a file, or a folder over a folder, of which one is there at any time but the moment
    between two renames.

    Raises:
        OSError: one is a file and the other a folder, or it cannot be written.
    """
    if not (_is_folder(new) and _is_folder(path)):
        os.replace(new, path)
        return
    # No system call that Python has replaces a folder with something in it.
    aside = path.with_name(f".{os.getpid()}-old-{path.name}")
    _remove(aside)
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    """Where the folder around it is none, there is nothing to remove, and that is not the error to report."""
    with contextlib.suppress(OSError):
        if _is_folder(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_folder(path: Path) -> bool:
    """Itself, not through a link."""
    return path.is_dir() and not path.is_symlink()


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
    """Hex digest of a file; of a folder that of the names and contents of everything in it, in their order.

    No link in a folder is followed: its target's name counts as its content.
    """
    if not path.is_dir():
        return _of_file(path)
    digest = hashlib.sha256()
    for name, part in _parts(path):
        link = part.is_symlink()
        content = os.readlink(part) if link else _of_file(part)
        digest.update(json.dumps([name, link, content]).encode())
    return digest.hexdigest()


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links in it count nothing."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(part.stat().st_size for _, part in _parts(path) if not part.is_symlink())


def _parts(folder: Path) -> list[tuple[str, Path]]:
    """Files and links in a folder and the folders in it, by their names."""
    found = [part for part in folder.rglob("*") if part.is_symlink() or not part.is_dir()]
    return sorted((part.relative_to(folder).as_posix(), part) for part in found)


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
