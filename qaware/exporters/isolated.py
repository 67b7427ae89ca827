"""Run an artifact in a process of its own, so that a dying runtime does not take the training run along.

The child is a plain command (``serving.py``) rather than one of ``multiprocessing``: spawn would run the
user's script again. Arrays travel through pipes and memory that both share (``transport.py``, nothing is
pickled); what the runtime prints goes to stderr, whose end is quoted when it dies.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError, RuntimeDiedError
from qaware.exporters.artifact import Artifact
from qaware.exporters.decode import decode
from qaware.exporters.serving import ERROR, OK, STEP
from qaware.exporters.transport import Lane, receive, send

_UNDER_WAY = 2
"""Calls at a time: one that runs and one that waits. There is memory for as many."""


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
        self._sent, self._received = Lane(), Lane()
        shared = *self._sent.descriptors, *self._received.descriptors
        self._waiting: deque[Answer] = deque()
        command = [sys.executable, "-m", "qaware.exporters.serving", artifact.runtime, str(artifact.path)]
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
        return self.submit(*tensors).get()

    def submit(self, *tensors: Tensor) -> Answer:
        """Start a call; another one may still run.

        Raises:
            QawareError: an input is not legal.
        """
        self.artifact.signature.validate(tensors)
        return self._ask(OK, tensors)

    def step(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits float32 (1, S, V) of the int64 ids (1, S) from ``start`` on, after those of earlier calls.

        Raises:
            QawareError: the artifact has no key-value cache, or the tokens do not fit into it.
        """
        if not self.length:
            raise QawareError(f"{self.artifact.path.name}: has no key-value cache; {_why(self.artifact)}")
        self.artifact.signature.validate([input_ids])
        return self._ask(STEP, [input_ids, torch.tensor(start)]).get()

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, **options: Any) -> Tensor:
        """The prompt and the tokens that follow it, int64 (1, T + n); see :func:`qaware.exporters.decode`.

        Args:
            input_ids: int64 (1, T).
            max_new_tokens: n is less where a token of ``stop`` came.
            options: ``stop``, ``temperature``, ``top_k``, ``seed``.
        """
        tokens = list(decode(self, input_ids, max_new_tokens, **options))
        return torch.cat([input_ids, torch.tensor([tokens], dtype=torch.int64)], 1)

    def _ask(self, what: bytes, tensors: Sequence[Tensor]) -> Answer:
        arrays = [t.detach().cpu().contiguous().numpy() for t in tensors]
        if len(self._waiting) == _UNDER_WAY:
            self._take()
        try:
            send(cast(BinaryIO, self._child.stdin), self._sent.next(), what, arrays)
        except BrokenPipeError:
            raise self._died() from None
        self._waiting.append(Answer(self))
        return self._waiting[-1]

    def _take(self) -> None:
        """Receive the answer to the first call that waits for one."""
        answer = self._waiting.popleft()
        try:
            found, seconds = self._receive()
            answer.found, answer.seconds = torch.from_numpy(found), float(seconds)
        except QawareError as error:
            answer.error = error

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
        reply = receive(cast(BinaryIO, self._child.stdout), self._received.next())
        if reply is None:
            raise self._died()
        status, arrays = reply
        if status == ERROR:
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


class Answer:
    """That of one call, which runs meanwhile."""

    seconds: float
    """Wall time of the runtime, once it is there."""

    def __init__(self, runner: IsolatedRunner) -> None:
        self.found: Tensor | None = None
        self.error: QawareError | None = None
        self._runner = runner

    def get(self) -> Tensor:
        """Wait for it; float32 on the CPU.

        Raises:
            QawareError: see :class:`IsolatedRunner`.
        """
        while self in self._runner._waiting:
            self._runner._take()
        if self.error is not None:
            raise self.error
        assert self.found is not None
        return self.found


def open_artifact(path: str | Path) -> IsolatedRunner:
    """An exported file on its runtime: call it like the model, ``generate`` with it, ``close`` it.

    Raises:
        QawareError: there is no such file, it is damaged, or its runtime does not load it.
    """
    return IsolatedRunner(Artifact.open(Path(path)))


def _why(artifact: Artifact) -> str:
    notes = [note for note in artifact.notes if "key-value cache" in note]
    return notes[0] if notes else "only models with step(input_ids, positions, cache) are exported with one"
