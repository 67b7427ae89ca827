"""The hub is asked once whether it is there; here it is a socket of this machine."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import datasets
import pytest
from transformers.utils import logging

from qaware.errors import QawareError
from qaware.lm import loading
from qaware.lm.build import from_weights
from qaware.lm.documents import read_documents
from qaware.lm.tokens import load_tokenizer


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)  # an answer nevertheless

    def log_message(self, *_: Any) -> None:
        pass


def test_one_line_is_the_first_that_says_something() -> None:
    assert loading.one_line(ValueError("\n  one \ntwo")) == "one"
    assert loading.one_line(ValueError()) == "ValueError"


def test_a_hub_that_answers(absent_hub: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not loading.hub_answers()
    server = http.server.HTTPServer(absent_hub.getsockname(), _Hub, bind_and_activate=False)
    server.socket.close()
    server.socket = absent_hub
    server.server_activate()
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert loading.hub_answers()
    thread.join()


def test_a_hub_that_says_nothing(absent_hub: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PATIENCE", 0.1)
    absent_hub.listen()
    assert not loading.hub_answers()


@pytest.mark.usefixtures("offline")
def test_offline_mode_is_no_answer() -> None:
    assert not loading.hub_answers()


@pytest.mark.usefixtures("absent_hub")
@pytest.mark.parametrize("load", [from_weights, load_tokenizer, read_documents])
def test_an_absent_hub_is_not_asked_again_and_again(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited before another try"))
    with pytest.raises(QawareError, match=r"'nobody/nothing' .*hub") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert not datasets.config.HF_HUB_OFFLINE


def _bars() -> tuple[bool, bool]:
    return not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("quiet", "inside"),
    [(loading.quiet_datasets, (False, True)), (loading.quiet_transformers, (True, False))],
    ids=["datasets", "transformers"],
)
def test_bars_come_back(quiet: Callable[[], Any], inside: tuple[bool, bool]) -> None:
    assert _bars() == (True, True)
    with quiet():
        with quiet():
            assert _bars() == inside
        assert _bars() == inside  # they were off before the inner one
    assert _bars() == (True, True)
