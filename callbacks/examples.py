"""One example of the inputs of the module to quantize, from the Trainer's own data."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from qaware.callbacks.data import find_target, raw_loader
from qaware.callbacks.nested import detached_copy, validate
from qaware.engines.example import Example, capture
from qaware.errors import QawareError


def find_example(trainer: pl.Trainer, pl_module: pl.LightningModule, target: str | None) -> Example:
    """What enters ``target`` in the user's own code: from ``example_input_array`` where the module has one,
    else from the first validation batch, else from the first training batch given to ``forward``.

    Raises:
        QawareError: none of these reaches the target; says what was tried.
    """
    module = detached_copy(pl_module)
    name = target or type(pl_module).__name__
    with isolate_rng():
        for attempt in (_from_array, _from_validation, _from_training):
            example = attempt(trainer, module, find_target(module, target))
            if example is not None:
                return example
    raise QawareError(
        f"{name}: integer activations need one batch, to see where the model rounds them, and neither "
        "validation_step nor forward on a training batch gave one; set self.example_input_array in the "
        "LightningModule"
    )


def example_of_array(pl_module: pl.LightningModule, target: str | None) -> Example | None:
    """What enters ``target`` when the module runs on its ``example_input_array``; None without one."""
    module = detached_copy(pl_module)
    return _from_array(None, module, find_target(module, target))


def _from_array(trainer: Any, module: pl.LightningModule, root: nn.Module) -> Example | None:
    array = module.example_input_array
    if array is None:
        return None
    if isinstance(array, dict):
        return capture(root, lambda: module(**array))
    return capture(root, lambda: module(*(array if isinstance(array, tuple) else (array,))))


def _from_validation(trainer: pl.Trainer, module: pl.LightningModule, root: nn.Module) -> Example | None:
    if not is_overridden("validation_step", module) or trainer.limit_val_batches == 0:
        return None
    loader = raw_loader(trainer, "val")
    return None if loader is None else capture(root, lambda: validate(module, loader, 1))


def _from_training(trainer: pl.Trainer, module: pl.LightningModule, root: nn.Module) -> Example | None:
    loader = raw_loader(trainer, "train")
    if loader is None:
        return None
    batch = next(iter(loader))
    first = batch[0] if isinstance(batch, (tuple, list)) else batch

    def run() -> None:
        if isinstance(batch, dict):
            module(**{k: v for k, v in batch.items() if k not in ("labels", "label", "target", "targets")})
        else:
            module(first)

    try:
        return capture(root, run)
    except Exception:  # forward takes something else; the error of the caller says what to do
        return None
