"""What is scored: the task of a LightningModule and its data, and a part of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl

from qaware.callbacks.data import make_task
from qaware.callbacks.nested import detached_copy
from qaware.errors import QawareError
from qaware.tasks import ClassificationTask, LanguageTask, Task

BATCHES = 256
"""Validation batches that are recorded at most."""


def task_for(model: pl.LightningModule, data: Any, target: str | None = None) -> Task:
    """What the validation data of ``model`` are scored by.

    Args:
        model: runs one validation batch, which attaches the data and checks that they fit.
        data: a LightningDataModule or validation loader.
        target: submodule that is quantized.

    Raises:
        QawareError: there is no validation data, or it cannot be scored.
    """
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
    )
    if isinstance(data, pl.LightningDataModule):
        trainer.validate(model, datamodule=data, verbose=False)
    else:
        trainer.validate(model, data, verbose=False)
    return scored_task(make_task(trainer, detached_copy(model), target, [], BATCHES))


def scored_task(task: Task | None) -> LanguageTask | ClassificationTask:
    """``task``, which has a score.

    Raises:
        QawareError: it has none, or there is no validation data.
    """
    if task is None:
        raise QawareError(
            "data: there is no validation data to score on; give val_source, or a val_dataloader"
        )
    if not isinstance(task, (LanguageTask, ClassificationTask)):
        raise QawareError(
            "data: outputs are neither logits of tokens nor of labelled classes, so no layer can be said to "
            "cost anything; give labels in the validation batches"
        )
    return task


def head(task: LanguageTask | ClassificationTask, count: int) -> LanguageTask | ClassificationTask:
    """The first ``count`` windows or batches.

    Raises:
        QawareError: fewer than 2, without which there is no interval.
    """
    if count < 2:
        raise QawareError(f"windows: {count} must be 2 or more, because intervals come from several windows")
    if isinstance(task, LanguageTask):
        return dataclasses.replace(task, windows=task.windows.head(count), metrics=())
    return dataclasses.replace(task, inputs=task.inputs[:count], labels=task.labels[:count], metrics=())
