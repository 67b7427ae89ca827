"""Arrays between a process and its child: small ones go through a pipe, large ones through shared memory.

The memory is a file without a name, which the child inherits as an open descriptor: whichever process dies,
and however, the kernel frees it with the last of the two, so that there is nothing to clean up.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

SMALL = 1 << 14
"""Bytes of an array up to which it travels in the pipe."""

_HEAD, _ARRAY, _SIZE = struct.Struct("<cI"), struct.Struct("<8sBQQ"), struct.Struct("<Q")
_ALIGNMENT = 64
_IN_PIPE = (1 << 64) - 1

Message = tuple[bytes, list[np.ndarray]]
"""One byte that says what it is, and the arrays."""


class Area:
    """Memory that two processes share, for the arrays of one direction; holds those of the last message."""

    def __init__(self, descriptor: int | None = None) -> None:
        """
        Args:
            descriptor: of the area that the other process made; None makes one.
        """
        self.descriptor = _anonymous() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None

    def write(self, arrays: Sequence[np.ndarray]) -> list[int]:
        """Copy arrays in, over those of the message before; their offsets in bytes."""
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if end > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, end)
        for offset, array in zip(offsets, arrays, strict=True):
            _view(self._mapped(end), array.dtype, array.shape, offset)[...] = array
        return offsets

    def read(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """A copy of an array that the other process has put at ``offset``."""
        size = dtype.itemsize * int(np.prod(shape))
        found: np.ndarray = _view(self._mapped(offset + size), dtype, shape, offset).copy()
        return found

    def close(self) -> None:
        """Let go of it; calling it again does nothing."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _mapped(self, size: int) -> mmap.mmap:
        """The area, mapped anew where it has grown."""
        if self._map is None or len(self._map) < size:
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        return self._map


class Lane:
    """Two areas for one direction, which take turns: a message may be sent while the one before is not read
    yet. Both processes take the next for each message."""

    def __init__(self, *descriptors: int) -> None:
        """
        Args:
            descriptors: of the areas that the other process made; none makes two.
        """
        self._areas = [Area(descriptor) for descriptor in descriptors] or [Area(), Area()]

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Of its areas."""
        return tuple(area.descriptor for area in self._areas)

    def next(self) -> Area:
        """The one whose turn it is."""
        self._areas.reverse()
        return self._areas[0]

    def close(self) -> None:
        """Let go of both; calling it again does nothing."""
        for area in self._areas:
            area.close()


def send(pipe: BinaryIO, area: Area, status: bytes, arrays: Sequence[np.ndarray]) -> None:
    """Send one message; it must be received before the next is sent.

    Raises:
        BrokenPipeError: the other process is gone.
    """
    arrays = [np.ascontiguousarray(array).reshape(array.shape) for array in arrays]
    large = [array for array in arrays if array.nbytes > SMALL]
    places = iter(area.write(large))
    pipe.write(_HEAD.pack(status, len(arrays)))
    for array in arrays:
        offset = next(places) if array.nbytes > SMALL else _IN_PIPE
        pipe.write(_ARRAY.pack(array.dtype.str.encode(), array.ndim, array.nbytes, offset))
        pipe.write(b"".join(_SIZE.pack(size) for size in array.shape))
        if offset == _IN_PIPE:
            pipe.write(array.tobytes())
    pipe.flush()


def receive(pipe: BinaryIO, area: Area) -> Message | None:
    """One message, whose arrays nobody else writes to; None when the other process is gone."""
    head = _read(pipe, _HEAD.size)
    if head is None:
        return None
    status, count = _HEAD.unpack(head)
    arrays = [_receive_array(pipe, area) for _ in range(count)]
    found = [array for array in arrays if array is not None]
    return (status, found) if len(found) == count else None


def _receive_array(pipe: BinaryIO, area: Area) -> np.ndarray | None:
    head = _read(pipe, _ARRAY.size)
    if head is None:
        return None
    code, dimensions, size, offset = _ARRAY.unpack(head)
    sizes = _read(pipe, dimensions * _SIZE.size)
    if sizes is None:
        return None
    dtype, shape = np.dtype(code.rstrip(b"\0").decode()), tuple(n for (n,) in _SIZE.iter_unpack(sizes))
    if offset != _IN_PIPE:
        return area.read(dtype, shape, offset)
    body = _read(pipe, size)
    return None if body is None else np.frombuffer(bytearray(body), dtype).reshape(shape)


def _read(pipe: BinaryIO, size: int) -> bytes | None:
    data = pipe.read(size) if size else b""
    return data if len(data) == size else None


def _view(memory: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    view: np.ndarray = np.ndarray(shape, dtype, memory, offset)
    return view


def _anonymous() -> int:
    """The descriptor of an empty file without a name; in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("qaware")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
