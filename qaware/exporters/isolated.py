"""Run an artifact in a process of its own, so that a dying runtime does not take the training run along.

The child is ``python -m qaware.exporters.isolated RUNTIME PATH``. A plain command rather than
``multiprocessing``: spawn would run the user's script again. Arrays travel as ``.npy`` (never
pickled) over pipes; what the runtime prints goes to stderr, whose end is quoted when it dies.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError, RuntimeDiedError
from qaware.exporters.artifact import Artifact

_OK, _ERROR = b"O", b"E"


class IsolatedRunner:
    """An artifact that is loaded and run in a child process; call it like the model.

    Raises on construction and on call:
        QawareError: the artifact is damaged, an input is not legal, or the runtime reports an error.
        RuntimeDiedError: the runtime's process ended; the message has the signal and its last words.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        # Digest checked here, by the parent, before any native code is loaded.
        Artifact.open(artifact.path)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed with the child
        command = [sys.executable, "-m", "qaware.exporters.isolated", artifact.runtime, str(artifact.path)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr
        )
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Positional tensors as in the signature; returns float32 on the CPU."""
        self.artifact.signature.validate(tensors)
        arrays = [t.detach().cpu().contiguous().numpy() for t in tensors]
        try:
            _send(cast(BinaryIO, self._child.stdin), _OK, arrays)
        except BrokenPipeError:
            raise self._died() from None
        return torch.from_numpy(self._receive()[0])

    def close(self) -> None:
        """End the child; calling it again does nothing."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._stderr):
            # What a dead child has not read cannot be flushed.
            with contextlib.suppress(BrokenPipeError):
                cast(BinaryIO, pipe).close()

    def __enter__(self) -> IsolatedRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> list[np.ndarray]:
        reply = _read(cast(BinaryIO, self._child.stdout))
        if reply is None:
            raise self._died()
        status, arrays = reply
        if status == _ERROR:
            raise QawareError(
                f"{self.artifact.path.name} on {self.artifact.runtime}: {bytes(arrays[0]).decode()}"
            )
        return arrays

    def _died(self) -> RuntimeDiedError:
        code = self._child.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        said = f"; it said: {' | '.join(lines[-3:])[-400:]}" if lines else ""
        return RuntimeDiedError(
            f"{self.artifact.path.name}: the process of {self.artifact.runtime} {how}{said}"
        )


def _send(pipe: BinaryIO, status: bytes, arrays: list[np.ndarray]) -> None:
    buffer = io.BytesIO()
    for array in arrays:
        np.save(buffer, array, allow_pickle=False)
    body = buffer.getvalue()
    pipe.write(struct.pack("<cIQ", status, len(arrays), len(body)))
    pipe.write(body)
    pipe.flush()


def _read(pipe: BinaryIO) -> tuple[bytes, list[np.ndarray]] | None:
    """One message, or None when the other side is gone."""
    size = struct.calcsize("<cIQ")
    head = pipe.read(size)
    if len(head) < size:
        return None
    status, count, length = struct.unpack("<cIQ", head)
    body = pipe.read(length)
    if len(body) < length:
        return None
    buffer = io.BytesIO(body)
    return status, [np.load(buffer, allow_pickle=False) for _ in range(count)]


def _text(message: str) -> list[np.ndarray]:
    return [np.frombuffer(message.encode(), dtype=np.uint8)]


def serve(runtime: str, path: Path) -> None:
    """The child's loop: load, say so, then answer calls until stdin closes."""
    from qaware.exporters import get_exporter
    from qaware.exporters.base import first_line

    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the runtime prints must not mix with the replies
    try:
        run = get_exporter(runtime).open(path, Artifact.open(path).signature)
        _send(replies, _OK, [])
    except Exception as error:
        _send(replies, _ERROR, _text(f"cannot be loaded: {first_line(error)}"))
        return
    while (request := _read(requests)) is not None:
        try:
            tensors = [torch.from_numpy(a) for a in request[1]]
            with torch.no_grad():
                _send(replies, _OK, [run(*tensors).float().contiguous().numpy()])
        except Exception as error:
            _send(replies, _ERROR, _text(first_line(error)))


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
