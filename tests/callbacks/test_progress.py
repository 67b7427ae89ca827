"""Bars of the Trainer's own kind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lit import LitLM, loader, trainer

from qaware import PostTrainingQuantization
from qaware.callbacks.progress import trainer_progress
from qaware.pipeline import no_progress


def test_calibration_and_scoring_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ptq = PostTrainingQuantization("int8-static", output_dir=tmp_path)
    run = trainer(callbacks=[ptq, TQDMProgressBar()], enable_progress_bar=True, max_epochs=1)
    run.fit(LitLM(), loader(), loader(9))
    shown = capsys.readouterr().out
    assert "Calibrating" in shown
    assert "Scoring converted" in shown


def test_rich_shares_the_live_display(capsys: pytest.CaptureFixture[str]) -> None:
    bar = RichProgressBar()
    run = trainer(callbacks=[bar], enable_progress_bar=True)
    bar._init_progress(run)
    with trainer_progress(run)("Exporting to x", 2) as advance:
        advance()
        assert [(t.description, t.completed) for t in bar.progress.tasks] == [("Exporting to x", 1)]
    assert bar.progress.tasks == []
    bar._stop_progress()
    with trainer_progress(run)("Scoring y", 1) as advance:
        advance()


def test_every_step_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(callbacks=[TQDMProgressBar()], enable_progress_bar=True)
    with trainer_progress(run)("Exporting to x", 3) as advance:
        for _ in range(3):
            time.sleep(0.11)  # tqdm draws at most ten times a second
            advance()
    assert "3/3" in capsys.readouterr().out


def test_nothing_when_the_bar_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer_progress(trainer()) is no_progress
    with no_progress("x", 1) as advance:
        advance()
    assert capsys.readouterr().out == ""
