"""Fixtures of the acceptance cases."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers write into the working directory unless told otherwise."""
    monkeypatch.chdir(tmp_path)
