"""Strategies that spawn or fork: refused until the model is prepared in the main process; then they work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .spawned import STRATEGIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What one main process held after each strategy."""
    command = [sys.executable, "-m", "acceptance.spawned", str(folder)]
    tests = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_case_24_the_main_process_gets_the_trained_prepared_model(
    strategy: str, found: dict[str, Any], folder: Path
) -> None:
    """These strategies load the trained weights, not strictly, into the module of the main process: an
    unprepared one would be float, or untrained, without a word."""
    held = found["trained"][strategy]
    assert held["prepared"] == ["body.down", "body.embed", "body.head", "body.up"]
    assert held["trained"]
    assert held["converted"] == held["fake_quant"] < held["float"] - 0.1
    rows = (folder / strategy / "results.jsonl").read_text().splitlines()
    assert [json.loads(row)["stage"] for row in rows] == ["float", "prepared", "converted"]


def test_case_24_an_unprepared_model_is_refused(found: dict[str, Any]) -> None:
    """For real once; ``test_strategies.py`` asks for each strategy."""
    assert "call qaware.prepare(model, recipe, target) before trainer.fit" in found["refused"]
