"""When a fit rounds, observes and moves its statistics: functions of the optimizer step alone, so that a
resume lands in the phase that it left."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl

from qaware.callbacks.batch_norm import freeze_batch_norm
from qaware.callbacks.data import find_target
from qaware.engines.fake_quant import set_fake_quant, set_softness
from qaware.errors import QawareError
from qaware.observers import observers


@dataclass(frozen=True)
class Schedule:
    """The steps of :class:`qaware.QuantizationAwareTraining`, where they are explained."""

    start_step: int = 0
    anneal_steps: int = 0
    freeze_observers_step: int | None = None
    freeze_batch_norm_step: int | None = None

    def __post_init__(self) -> None:
        for key in ("start_step", "anneal_steps"):
            if getattr(self, key) < 0:
                raise QawareError(f"{key}: {getattr(self, key)} must be 0 or more")
        for key in ("freeze_observers_step", "freeze_batch_norm_step"):
            step = getattr(self, key)
            if step is not None and step < 1:
                raise QawareError(f"{key}: {step} must be at least 1, or None")

    def rounds(self, step: int) -> bool:
        """Whether the forward pass of ``step`` rounds."""
        return step >= self.start_step

    def softness(self, step: int) -> float:
        """From 1 at ``start_step`` down to 0 when the annealing is over."""
        if not self.anneal_steps:
            return 0.0
        return min(1.0, max(0.0, 1.0 - (step - self.start_step) / self.anneal_steps))

    def set_phase(
        self, pl_module: pl.LightningModule, target: str | None, step: int, observing: bool
    ) -> None:
        """Set every flag of a prepared module as it is at ``step``.

        Args:
            pl_module: prepared.
            target: name of the quantized submodule.
            step: optimizer steps that were made.
            observing: whether a training batch is under way.
        """
        set_fake_quant(pl_module, self.rounds(step))
        set_softness(pl_module, self.softness(step))
        for observer in observers(pl_module):
            observer.observing = observing and not _reached(step, self.freeze_observers_step)
        if observing and _reached(step, self.freeze_batch_norm_step):
            freeze_batch_norm(find_target(pl_module, target))


def _reached(step: int, limit: int | None) -> bool:
    return limit is not None and step >= limit
