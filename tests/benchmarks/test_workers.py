"""A process that is asked over a pipe: what goes wrong in it is an answer, never a hang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.worker import peak_bytes
from benchmarks.workers import Child, WorkerError


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    with Child(tmp_path / "logs" / "child.log", 1) as started:
        yield started


def test_an_error_is_one_line_and_the_process_lives_on(child: Child) -> None:
    for _ in range(2):
        with pytest.raises(WorkerError, match="KeyError: 'nothing'"):
            child.ask("build", name="nothing", model="lm", variant="fp32", size="tiny", folder="nowhere")
    assert not child.ended


def test_a_process_that_ended_is_told_with_its_log(child: Child) -> None:
    child._process.kill()
    with pytest.raises(WorkerError, match=r"ended with code -9; see .*child\.log"):
        child.ask("time", what="decode", count=1)
    assert child.ended


def test_the_end_of_a_process_is_not_waited_for_long(tmp_path: Path) -> None:
    with Child(tmp_path / "child.log", 1) as started:
        pass
    assert started._process.returncode == 0


def test_memory_is_what_this_process_held() -> None:
    assert 10e6 < peak_bytes() < 1e12
