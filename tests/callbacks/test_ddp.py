"""Two processes on gloo, started by Lightning, against one process; see ``callback_ranks`` for what runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import callback_ranks as ranks
import pytest
import torch

from qaware.report.ledger import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks found, for every job."""
    command = [sys.executable, str(Path(ranks.__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_score_like_one_and_write_once(two: list[dict[str, Any]], folder: Path) -> None:
    first, second = (result["scores"] for result in two)
    assert first == second
    assert first["converted"] == first["prepared"]
    assert first["converted"] == pytest.approx(ranks.scores(1, folder)["converted"], abs=1e-4)
    rows = read_rows(folder / "out2" / "results.jsonl")
    assert [row["stage"] for row in rows] == ["float", "prepared", "converted"]


def test_ranges_are_identical_for_one_and_two_processes(two: list[dict[str, Any]], folder: Path) -> None:
    alone = ranks.ranges(1, folder)
    assert [result["ranges"] for result in two] == [alone, alone]
    assert alone["minmax fit"] == alone["minmax validate"], "without a step the model is the same"
    assert alone["minmax fit"] != alone["histogram fit"]


def test_two_processes_have_one_teacher_and_step_like_one(two: list[dict[str, Any]], folder: Path) -> None:
    first, second = (result["distilled"] for result in two)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone = ranks.distilled(1, folder)
    torch.testing.assert_close(first["teacher"], alone["teacher"], rtol=0, atol=0)
    torch.testing.assert_close(first["student"], alone["student"], rtol=1e-5, atol=1e-6)


def test_two_processes_train_the_same_scales(two: list[dict[str, Any]]) -> None:
    """Before ``start_step`` no scale is used, and DDP waits for the gradient of every parameter."""
    first, second = (result["learned"] for result in two)
    assert first == second
    assert all(any(value != 0 for value in gain) for gain, _ in first)
