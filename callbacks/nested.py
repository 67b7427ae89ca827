"""Run the user's own validation steps outside the Trainer's loops: to calibrate, and to see the data."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch.utils._pytree import tree_leaves

from qaware.callbacks.hooks import restore
from qaware.sharded import copyable


def detached_copy(pl_module: pl.LightningModule) -> pl.LightningModule:
    """A deep copy on the CPU, in evaluation mode, that knows no Trainer and carries no override.

    Sharded parameters are gathered: then it is a collective, and every rank must call it.
    """
    trainer = pl_module._trainer
    pl_module._trainer = None
    try:
        with copyable(pl_module) as whole:
            memo = {**_graph_tensors(pl_module), id(pl_module._device_mesh): None, **whole}
            duplicate = copy.deepcopy(pl_module, memo)
    finally:
        pl_module._trainer = trainer
    restore(duplicate)
    return duplicate.cpu().eval()


def _graph_tensors(pl_module: pl.LightningModule) -> dict[int, Any]:
    """Stand-ins for tensors that hang in an autograd graph, which cannot be deep-copied. Users keep such
    tensors (``self.outputs.append(loss)``), and so does ``torch.nn.utils.prune``.
    """
    kept = (value for module in pl_module.modules() for value in tree_leaves(dict(vars(module))))
    return {id(t): t.detach().clone() for t in kept if isinstance(t, torch.Tensor) and not t.is_leaf}


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
            # Under torchrun or SLURM this one process is not the job that the environment describes.
            plugins=[LightningEnvironment()],
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
