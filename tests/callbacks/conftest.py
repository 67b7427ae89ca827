"""Fixtures of the callbacks' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runtime import InProcess

import qaware.exporters
import qaware.measuring
import qaware.pipeline


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers write into the working directory unless told otherwise."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the runtimes ``fake`` and ``wrong`` available."""
    monkeypatch.setitem(qaware.exporters.BUILTIN, "fake", "fake_runtime:FakeExporter")
    monkeypatch.setitem(qaware.exporters.BUILTIN, "wrong", "fake_runtime:WrongExporter")
    monkeypatch.setattr(qaware.pipeline, "IsolatedRunner", InProcess)
    monkeypatch.setattr(qaware.measuring, "IsolatedRunner", InProcess)
