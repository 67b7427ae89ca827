"""Tokens on disk: what the files in a cache folder hold, and how such a folder comes to be."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FORMAT = 1
"""Goes into the name of a cache folder: raise it when the files in one change their meaning."""
Array = npt.NDArray[Any]


class Stream(NamedTuple):
    """Tokenized documents one after the other; each field is a file of its name."""

    ids: Array
    """Token ids, int32 (tokens,)."""
    bytes: Array
    """The utf-8 bytes that each token stands for, int32 (tokens,)."""
    ends: Array
    """Where each document ends in the stream, int64 (documents,)."""

    @classmethod
    def join(cls, documents: Iterable[tuple[Array, Array]]) -> Stream:
        """One stream of the ids and bytes of each document."""
        ids, used = zip(*documents, strict=True)
        ends = np.cumsum([len(document) for document in ids], dtype=np.int64)
        return cls(np.concatenate(ids), np.concatenate(used), ends)

    def save(self, folder: Path) -> None:
        """Write the files into a new folder."""
        folder.mkdir(parents=True)
        for name, array in self._asdict().items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def open(cls, folder: Path) -> Stream:
        """The stream of a folder, memory-mapped."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls._fields))


def digest(plain: Any) -> str:
    """Sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def publish(build: Callable[[Path], None], folder: Path) -> None:
    """Have ``build`` fill a folder under another name, and rename it: others see all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        built = Path(scratch) / "built"
        build(built)
        try:
            os.rename(built, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
