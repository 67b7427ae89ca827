"""The copies of a module that averaging callbacks keep."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import lightning.pytorch as pl
from torch.optim.swa_utils import AveragedModel


def averages(trainer: pl.Trainer) -> Iterator[pl.LightningModule]:
    """The averages of ``WeightAveraging`` and ``StochasticWeightAveraging``, which copy the module in their
    ``setup``: those that come before the QAT callback copied a float one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            average = average.module
        if isinstance(average, pl.LightningModule):
            yield average


def expect_override() -> None:
    """Silence the advice of ``WeightAveraging`` on overriding ``configure_model``, which QAT does."""
    warnings.filterwarnings(
        "ignore", message="You're using the WeightAveraging callback with a model that ov"
    )
