"""Run the user's own validation steps outside the Trainer's loops: to calibrate, and to see the data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import HalfPrecision
from torch.nn import Module

from qaware.callbacks.hooks import restore
from qaware.copying import deep_copy
from qaware.sharded import copyable

_BUILDERS = ("prepare_data", "setup", "configure_model", "teardown")
# Lightning puts the compiled functions of a `torch.compile`d module into these attributes; in a copy they
# would go on computing what the original computes.
_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def detached_copy(pl_module: pl.LightningModule) -> pl.LightningModule:
    """A deep copy on the CPU, in evaluation mode, that knows no Trainer and carries no override.

    Sharded parameters are gathered: then it is a collective, and every rank must call it.
    """
    trainer = pl_module._trainer
    pl_module._trainer = None
    try:
        with copyable(pl_module) as whole:
            # A datamodule that the module keeps knows the Trainer too.
            foreign = (trainer, pl_module._device_mesh, pl_module._compiler_ctx)
            duplicate = deep_copy(pl_module, {**dict.fromkeys(map(id, foreign)), **whole})
    finally:
        pl_module._trainer = trainer
    duplicate._metric_attributes = None  # Lightning's cache, by the ids of the original's metrics
    if pl_module._compiler_ctx is not None:
        for name in _COMPILED:
            vars(duplicate).pop(name, None)
    restore(duplicate)
    return duplicate.cpu().eval()


def validate(
    module: pl.LightningModule, loader: Any, limit: int | float, callbacks: list[Callback] | None = None
) -> dict[str, float]:
    """One pass of ``module.validation_step`` over ``loader`` and the metrics that it logs.

    Args:
        module: a detached copy; gets and loses a Trainer of its own. It is built already, so its hooks that
            build do not run again.
        loader: what ``Trainer.validate`` takes.
        limit: batches at most; 1.0 for all.
        callbacks: hooks into the loop.
    """
    # Low-precision modules want their batches converted; mixed precision keeps float32 weights.
    half = _PRECISION.get(_dtype(module))
    with _quiet(), _built(module):
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=DummyLogger(),  # steps may call their logger's own functions
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=limit,
            callbacks=callbacks,
            # Under torchrun or SLURM this one process is not the job that the environment describes.
            plugins=[LightningEnvironment(), *([] if half is None else [_HalfInputs(half)])],
            # Tensors made under inference_mode could not be updated or trained afterwards.
            inference_mode=False,
        )
        try:
            return dict(trainer.validate(module, loader, verbose=False)[0])
        finally:
            module._trainer = None
            module.eval()


class _HalfInputs(HalfPrecision):
    """Half precision that converts the batches only: the module has been converted where it should be, and
    its observers keep float32."""

    def convert_module(self, module: Module) -> Module:
        return module


@contextmanager
def _built(module: pl.LightningModule) -> Iterator[None]:
    """Neither build the model anew, which would drop its quantizers, nor take it apart."""
    for name in _BUILDERS:
        object.__setattr__(module, name, _nothing)
    try:
        yield
    finally:
        for name in _BUILDERS:
            del vars(module)[name]


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of a hook."""


_PRECISION: dict[torch.dtype, Any] = {torch.bfloat16: "bf16-true", torch.float16: "16-true"}


def _dtype(module: pl.LightningModule) -> torch.dtype:
    """That of the first weight which is not an integer."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


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
