"""Run an artifact in a process of its own, so that a dying runtime does not take the training run along.

The child is ``python -m qaware.exporters.isolated RUNTIME PATH IN OUT``. A plain command rather than
``multiprocessing``: spawn would run the user's script again. Arrays travel through pipes and memory that
both share (``transport.py``, nothing is pickled), whose descriptors are IN and OUT; what the runtime prints
goes to stderr, whose end is quoted when it dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError, RuntimeDiedError
from qaware.exporters.artifact import Artifact
from qaware.exporters.decode import decode
from qaware.exporters.transport import Area, receive, send

_OK, _ERROR, _STEP = b"O", b"E", b"S"


class IsolatedRunner:
    """An artifact that is loaded and run in a child process; call it like the model.

    Raises on construction and on call:
        QawareError: the artifact is damaged, an input is not legal, or the runtime reports an error.
        RuntimeDiedError: the runtime's process ended; the message has the signal and its last words.
    """

    elsewhere = True
    """It computes in another process; see :func:`qaware.metrics.collect.computes_elsewhere`."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        # Digest checked here, by the parent, before any native code is loaded.
        Artifact.open(artifact.path)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed with the child
        self._sent, self._received = Area(), Area()
        shared = self._sent.descriptor, self._received.descriptor
        command = [sys.executable, "-m", "qaware.exporters.isolated", artifact.runtime, str(artifact.path)]
        self._child = subprocess.Popen(
            [*command, *map(str, shared)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pass_fds=shared,
        )
        try:
            (sizes,) = self._receive()
        except BaseException:
            self.close()
            raise
        self.length, self.most = int(sizes[0]), int(sizes[1])
        """Tokens of its key-value cache, 0 for none, and the most tokens of one step."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Positional tensors as in the signature; returns float32 on the CPU."""
        self.artifact.signature.validate(tensors)
        return self._ask(_OK, tensors)

    def step(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits float32 (1, S, V) of the int64 ids (1, S) from ``start`` on, after those of earlier calls.

        Raises:
            QawareError: the artifact has no key-value cache, or the tokens do not fit into it.
        """
        if not self.length:
            raise QawareError(f"{self.artifact.path.name}: has no key-value cache; {_why(self.artifact)}")
        self.artifact.signature.validate([input_ids])
        return self._ask(_STEP, [input_ids, torch.tensor(start)])

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, **options: Any) -> Tensor:
        """The prompt and the tokens that follow it, int64 (1, T + n); see :func:`qaware.exporters.decode`.

        Args:
            input_ids: int64 (1, T).
            max_new_tokens: n is less where a token of ``stop`` came.
            options: ``stop``, ``temperature``, ``top_k``, ``seed``.
        """
        tokens = list(decode(self, input_ids, max_new_tokens, **options))
        return torch.cat([input_ids, torch.tensor([tokens], dtype=torch.int64)], 1)

    def _ask(self, what: bytes, tensors: Sequence[Tensor]) -> Tensor:
        arrays = [t.detach().cpu().contiguous().numpy() for t in tensors]
        try:
            send(cast(BinaryIO, self._child.stdin), self._sent, what, arrays)
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
        self._sent.close()
        self._received.close()

    def __enter__(self) -> IsolatedRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> list[np.ndarray]:
        reply = receive(cast(BinaryIO, self._child.stdout), self._received)
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


def open_artifact(path: str | Path) -> IsolatedRunner:
    """An exported file on its runtime: call it like the model, ``generate`` with it, ``close`` it.

    Raises:
        QawareError: there is no such file, it is damaged, or its runtime does not load it.
    """
    return IsolatedRunner(Artifact.open(Path(path)))


def _why(artifact: Artifact) -> str:
    notes = [note for note in artifact.notes if "key-value cache" in note]
    return notes[0] if notes else "only models with step(input_ids, positions, cache) are exported with one"


def _text(message: str) -> list[np.ndarray]:
    return [np.frombuffer(message.encode(), dtype=np.uint8)]


def serve(runtime: str, path: Path, requested: Area, replied: Area) -> None:
    """The child's loop: load, say so, then answer calls until stdin closes."""
    from qaware.exporters import get_exporter

    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the runtime prints must not mix with the replies
    try:
        signature = Artifact.open(path).signature
        run: Any = _opened(get_exporter(runtime), path, signature)
        sizes = [getattr(run, "length", 0), getattr(run, "most", signature.longest)]
        send(replies, replied, _OK, [np.array(sizes, dtype=np.int64)])
    except Exception as error:
        send(replies, replied, _ERROR, _text(f"cannot be loaded: {_told(error)}"))
        return
    while (request := receive(requests, requested)) is not None:
        try:
            tensors = [torch.from_numpy(a) for a in request[1]]
            with torch.no_grad():
                asked = request[0] == _STEP
                output = run.step(tensors[0], int(tensors[1])) if asked else run(*tensors)
                send(replies, replied, _OK, [output.float().contiguous().numpy()])
        except Exception as error:
            send(replies, replied, _ERROR, _text(_told(error)))


def _opened(exporter: Any, path: Path, signature: Any) -> Any:
    from qaware.exporters.base import Exporter

    # Its packages; what exporting needs more, a compiler, is not asked for.
    if problem := Exporter.missing(exporter):
        raise QawareError(problem)
    return exporter.open(path, signature)


def _told(error: Exception) -> str:
    """One line; what qaware says itself needs no type."""
    from qaware.exporters.base import first_line

    return str(error) if isinstance(error, QawareError) else first_line(error)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), Area(int(sys.argv[3])), Area(int(sys.argv[4])))
