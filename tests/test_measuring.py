"""Measuring beside the main thread: results, errors and order are those of one after the other."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

import qaware.measuring as measuring
from qaware.errors import QawareError
from qaware.measuring import Beside


class Slow:
    """Waits for a permission, and notes in which thread."""

    needs_torch = False

    def __init__(self) -> None:
        self.go = threading.Event()
        self.thread: int | None = None

    def take(self) -> Any:
        self.thread = threading.get_ident()
        assert self.go.wait(30)
        return "measured"


def test_the_main_thread_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_cores", lambda: range(2))
    slow: Any = Slow()
    with Beside() as beside:
        future: Future[Any] = beside.start(lambda: slow)
        assert not future.done()
        slow.go.set()
        assert future.result(30) == "measured"
    assert slow.thread != threading.get_ident()


@pytest.mark.parametrize(("cores", "needs_torch"), [(1, False), (2, True)])
def test_it_waits_without_a_core_or_while_torch_models_run(
    cores: int, needs_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_cores", lambda: range(cores))
    slow: Any = Slow()
    slow.needs_torch = needs_torch
    slow.go.set()
    with Beside() as beside:
        assert beside.start(lambda: slow).done()


def test_an_error_is_the_futures() -> None:
    def fail() -> Any:
        raise QawareError("cannot be exported")

    with Beside() as beside, pytest.raises(QawareError, match="cannot be exported"):
        beside.start(fail).result()
