"""Machine: plain data about what made a number."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from qaware import machine


def test_versions_are_those_that_are_installed() -> None:
    found = machine.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert "torchao" in found


def test_the_cpu_is_plain_data() -> None:
    cpu = machine.cpu()
    assert cpu["machine"] == platform.machine()
    assert json.loads(json.dumps(cpu)) == cpu


def test_without_proc_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert machine.cpu()["features"] == []
    assert machine.cpu()["model"]
