"""tract's archive, a .tgz of a graph and its tensors: written small, read with Q4_0 weights as float32."""

from __future__ import annotations

import contextlib
import math
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_HEADER = 128
_SHAPE, _BITS, _KIND = 12, 44, 48
"""Bytes in the header of a tensor, as in NNEF 1.0: sizes from 12 on, their number before them."""
_Q40 = b"\x40\x30RT"
_BLOCK = 18


class _Deflated:
    """Writes gzip without name and time. Packed integers hardly repeat, and gain by their frequencies:
    ``Z_FILTERED`` with the largest blocks is 0.4% smaller than gzip's own setting, as fast."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.deflate = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS, 9, zlib.Z_FILTERED)

    def write(self, data: bytes) -> int:
        """Compress and write."""
        self.file.write(self.deflate.compress(data))
        return len(data)

    def close(self) -> None:
        """Write what is still held."""
        self.file.write(self.deflate.flush())


def pack(folder: Path, path: Path) -> None:
    """Write the files of ``folder`` as a .tgz, without owner and time."""
    with path.open("wb") as raw, contextlib.closing(_Deflated(raw)) as zipped:
        sink: Any = zipped
        with tarfile.open(fileobj=sink, mode="w|") as archive:
            for file in sorted(folder.iterdir()):
                entry = tarfile.TarInfo(file.name)
                entry.size = file.stat().st_size
                with file.open("rb") as content:
                    archive.addfile(entry, content)


def expand(path: Path, folder: Path) -> None:
    """Write the files of an archive into ``folder``, Q4_0 weights as float32."""
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            with (folder / Path(member.name).name).open("wb") as file:
                _copy(content.read(), file)


def _copy(data: bytes, file: BinaryIO) -> None:
    if data[_KIND : _KIND + len(_Q40)] != _Q40:
        file.write(data)
        return
    header = np.frombuffer(data[:_HEADER], np.uint8).copy()
    (rank,) = header[_SHAPE - 4 : _SHAPE].view(np.uint32)
    shape = header[_SHAPE : _SHAPE + 4 * int(rank)].view(np.uint32)
    header[4:8].view(np.uint32)[:] = 4 * math.prod(shape.tolist())
    header[_BITS : _BITS + 4].view(np.uint32)[:] = 32
    header[_KIND : _KIND + 4] = 0
    blocks = np.frombuffer(data, np.uint8, offset=_HEADER).reshape(-1, _BLOCK)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    integers = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    file.write(header.tobytes() + (integers * scale).tobytes())
