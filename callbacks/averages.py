"""The copies of a module that averaging callbacks keep."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import lightning.pytorch as pl
from torch.optim.swa_utils import AveragedModel

from qaware.errors import QawareError


def averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[pl.LightningModule]:
    """The averages of ``WeightAveraging`` and ``StochasticWeightAveraging``, which copy the module in their
    ``setup``: those that come before the QAT callback copied a float one.

    Raises:
        QawareError: there were no layers to copy yet; Lightning would average nothing, without a word.
    """
    wanted = _layers(pl_module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            average = average.module
        if not isinstance(average, pl.LightningModule):
            continue
        if _layers(average) != wanted:
            raise QawareError(
                f"{type(callback).__name__}: copied {type(pl_module).__name__} before its layers were built, "
                "and would average nothing; build them in __init__"
            )
        yield average


def _layers(pl_module: pl.LightningModule) -> int:
    """How many parameters the layers have, without scales that are learned."""
    return sum("_fake_quantizer." not in name for name, _ in pl_module.named_parameters())


def expect_override() -> None:
    """Silence the advice of ``WeightAveraging`` on overriding ``configure_model``, which QAT does."""
    warnings.filterwarnings(
        "ignore", message="You're using the WeightAveraging callback with a model that ov"
    )
