"""Run the user's own validation steps outside the Trainer's loops: to calibrate, and to see the data."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from qaware.callbacks.hooks import restore


def detached_copy(pl_module: pl.LightningModule) -> pl.LightningModule:
    """A deep copy in evaluation mode that knows no Trainer and carries no override."""
    trainer = pl_module._trainer
    pl_module._trainer = None
    try:
        duplicate = copy.deepcopy(pl_module)
    finally:
        pl_module._trainer = trainer
    restore(duplicate)
    return duplicate.cpu().eval()


def validate(
    module: pl.LightningModule, loader: Any, limit: int | float, callbacks: list[Callback] | None = None
) -> dict[str, float]:
    """One pass of ``module.validation_step`` over ``loader`` and the metrics that it logs.

    Args:
        module: a detached copy; gets and loses a Trainer of its own.
        loader: what ``Trainer.validate`` takes.
        limit: batches at most; 1.0 for all.
        callbacks: hooks into the loop.
    """
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=limit,
            callbacks=callbacks,
            # Tensors made under inference_mode could not be updated or trained afterwards.
            inference_mode=False,
        )
        try:
            return dict(trainer.validate(module, loader, verbose=False)[0])
        finally:
            module._trainer = None
            module.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No second banner about devices, and no advice meant for the outer Trainer."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.(pytorch|fabric)\..*")
            yield
    finally:
        logger.setLevel(level)
