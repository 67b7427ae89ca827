"""Strategies that spawn or fork: refused until the model is prepared in the main process; then they work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_case_24_the_main_process_gets_the_trained_prepared_model(strategy: str, tmp_path: Path) -> None:
    """These strategies load the trained weights, not strictly, into the module of the main process: an
    unprepared one would be float, or untrained, without a word."""
    command = [sys.executable, "-m", "acceptance.spawned", strategy, str(tmp_path)]
    tests = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "call qaware.prepare(model, recipe, target) before trainer.fit" in found["refused"]
    assert found["prepared"] == ["body.down", "body.embed", "body.head", "body.up"]
    assert found["trained"]
    assert found["converted"] == found["fake_quant"] < found["float"] - 0.1
    rows = (tmp_path / strategy / "results.jsonl").read_text().splitlines()
    assert [json.loads(row)["stage"] for row in rows] == ["float", "prepared", "converted"]
