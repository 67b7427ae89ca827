"""Strategies that cannot quantize while they train, or not without a call before it."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from qaware.callbacks.state import get_state
from qaware.errors import QawareError


def refuse_flat(trainer: pl.Trainer) -> None:
    """Refuse FSDP1 and DeepSpeed, which keep weights in flat pieces: neither a copy to score nor one to
    convert can be made of them.

    Raises:
        QawareError: says what to use instead.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise QawareError(
            f"strategy: {type(trainer.strategy).__name__} keeps weights in flat pieces, which cannot be "
            "quantized; use ModelParallelStrategy (FSDP2), or ddp"
        )


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
