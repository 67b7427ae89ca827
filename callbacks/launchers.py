"""Strategies that train in processes which give back only the weights."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from qaware.callbacks.state import get_state
from qaware.errors import QawareError


def require_prepared(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse to prepare inside a spawned or forked process: the weights that it sends back would be loaded,
    without a word, into a module of the main process that is not prepared.

    Raises:
        QawareError: says what to call first.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and get_state(pl_module) is None:
        raise QawareError(
            f"strategy: {launcher._start_method!r} trains in other processes, which give back only weights; "
            "call qaware.prepare(model, recipe, target) before trainer.fit (and model.configure_model() "
            "first, if layers are built there), and qaware.convert(model) after it"
        )
