"""Arrays between a process and its child."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from qaware.exporters.transport import SMALL, Area, Lane, receive, send

ECHO = """
import os, sys
from qaware.exporters.transport import Area, receive, send
there, back = (Area(int(number)) for number in sys.argv[1:])
while (message := receive(sys.stdin.buffer, there)) is not None:
    send(sys.stdout.buffer, back, message[0], [2 * array for array in message[1]])
"""


class Echo:
    """A child that doubles what it gets."""

    def __init__(self) -> None:
        self.there, self.back = Area(), Area()
        descriptors = self.there.descriptor, self.back.descriptor
        self.child: Any = subprocess.Popen(
            [sys.executable, "-c", ECHO, *map(str, descriptors)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
        )

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray] | None:
        send(self.child.stdin, self.there, b"O", arrays)
        reply = receive(self.child.stdout, self.back)
        return None if reply is None else reply[1]

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        self.child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        self.there.close()
        self.back.close()


@pytest.fixture
def echo() -> Any:
    child = Echo()
    yield child
    child.close()


def test_small_and_large_arrays_of_any_shape_and_dtype(echo: Echo) -> None:
    random = np.random.default_rng(0)
    large = random.random((3, SMALL))
    arrays = [
        np.array(3.5, np.float32),
        np.zeros((0, 4), np.int64),
        large,
        large.T,
        large[:, ::2].astype(np.float16),
        random.integers(0, 50, (SMALL,), dtype=np.int8),
        np.ones((2, 2), bool),
    ]
    for _ in range(2):
        found = echo(*arrays)
        assert found is not None
        for array, doubled in zip(arrays, found, strict=True):
            assert doubled.shape == array.shape
            assert doubled.dtype == (2 * array).dtype
            assert np.array_equal(doubled, 2 * array)


def test_what_was_received_stays(echo: Echo) -> None:
    first = echo(np.full(SMALL, 1.0))
    for size in (SMALL, 8 * SMALL):  # the second makes the area grow
        echo(np.full(size, 5.0))
    assert first is not None
    assert (first[0] == 2).all()
    first[0][:] = 7


def test_a_child_that_is_killed(echo: Echo) -> None:
    echo(np.ones(SMALL))
    os.kill(echo.child.pid, signal.SIGKILL)
    echo.child.wait()
    with pytest.raises(BrokenPipeError):
        echo(np.ones(SMALL))
    assert receive(echo.child.stdout, echo.back) is None


def test_half_a_message_is_none() -> None:
    area, whole = Area(), io.BytesIO()
    send(whole, area, b"O", [np.arange(5), np.zeros(SMALL)])
    for length in range(len(whole.getvalue())):
        assert receive(io.BytesIO(whole.getvalue()[:length]), area) is None
    status, arrays = receive(io.BytesIO(whole.getvalue()), area) or (b"", [])
    assert status == b"O"
    assert arrays[0].tolist() == [0, 1, 2, 3, 4]
    area.close()
    area.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to count open files")
def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        child = Echo()
        child(np.ones(SMALL))
        child.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_messages_are_under_way() -> None:
    there, pipe = Lane(), io.BytesIO()
    here = Lane(*there.descriptors)
    for turn in range(2):
        pipe.seek(0)
        for value in (1.0, 2.0):
            send(pipe, there.next(), b"O", [np.full(SMALL + turn, value)])
        pipe.seek(0)
        for value in (1.0, 2.0):
            found = receive(pipe, here.next())
            assert found is not None
            assert (found[1][0] == value).all()
    there.close()
    there.close()
