"""Text, data modules and hubs that the tests here share."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import huggingface_hub.constants
import pytest
import torch

from qaware.lm import TextDataModule

from .stories import SEPARATOR, STORIES

torch.set_num_threads(1)


@pytest.fixture
def stories(tmp_path: Path) -> str:
    path = tmp_path / "stories.txt"
    path.write_text(SEPARATOR.join(STORIES))
    return str(path)


@pytest.fixture
def make(tmp_path: Path, stories: str) -> Any:
    def build(source: str | list[str] = stories, **options: Any) -> TextDataModule:
        usual = {"tokenizer": 300, "separator": SEPARATOR, "block_size": 16, "batch_size": 4}
        return TextDataModule(source, **(usual | {"cache_dir": str(tmp_path / "cache")} | options))

    return build


def _set_offline(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    for settings in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", offline)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has said that there is no network."""
    _set_offline(monkeypatch, True)


@pytest.fixture
def absent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The user has not said so, but nothing listens at the hub's address (until a test makes it listen)."""
    _set_offline(monkeypatch, False)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()  # which may use a proxy
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        yield hub
    huggingface_hub.close_session()
