"""Progress of calibration, scoring and export, in the Trainer's own kind of bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from qaware.pipeline import Progress, no_progress


def trainer_progress(trainer: pl.Trainer) -> Progress:
    """A bar like the Trainer's: rich or tqdm, nothing on other ranks or when its bar is off."""
    bar = trainer.progress_bar_callback
    if not trainer.is_global_zero or bar is None or getattr(bar, "is_disabled", False):
        return no_progress
    if isinstance(bar, RichProgressBar):
        return lambda description, total: _rich(bar, description, total)
    return _tqdm if isinstance(bar, TQDMProgressBar) else no_progress


@contextlib.contextmanager
def _tqdm(description: str, total: int) -> Iterator[Callable[[], None]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=description, leave=False, file=sys.stdout) as bar:
        yield lambda: _advance(bar)


def _advance(bar: Any) -> None:
    bar.update()


def _rich(owner: RichProgressBar, description: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    """Rich allows one live display, so the Trainer's is shared while it is on screen."""
    live = owner.progress
    if live is not None and live.live.is_started:
        return _rich_task(live, description, total)
    return _rich_own(description, total)


@contextlib.contextmanager
def _rich_task(progress: object, description: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.progress import Progress as Bars

    assert isinstance(progress, Bars)
    task = progress.add_task(description, total=total)
    try:
        yield lambda: progress.advance(task)
    finally:
        progress.remove_task(task)


@contextlib.contextmanager
def _rich_own(description: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.progress import Progress as Bars

    with Bars(transient=True) as progress, _rich_task(progress, description, total) as advance:
        yield advance
