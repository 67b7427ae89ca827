"""Quantization-aware training: train with the rounding in the forward pass, ship those integers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from qaware.callbacks.base import QuantizationCallback
from qaware.callbacks.data import find_target
from qaware.callbacks.hooks import override, restore
from qaware.callbacks.nested import detached_copy
from qaware.callbacks.state import (
    KEY,
    PREPARED,
    QuantizationState,
    get_state,
    require_same_recipe,
    set_state,
    to_checkpoint,
)
from qaware.engines.base import float_bytes
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.observers import all_reduce, observers
from qaware.recipe import Recipe
from qaware.tasks import Task


class QuantizationAwareTraining(QuantizationCallback):
    """Fake-quantize the model while ``Trainer.fit`` trains it; convert a copy when it ends.

    The module stays trainable and its checkpoints stay loadable: ``result.model`` is a converted copy.

    Example::

        qat = QuantizationAwareTraining("int8-dynamic-int4-weight", export=["executorch", "tract"])
        Trainer(max_steps=1000, callbacks=[qat]).fit(model, datamodule=data)
        qat.result.model, qat.result.scores, qat.result.artifacts
    """

    method = "qat"

    def __init__(
        self,
        recipe: str | dict[str, Any] | Recipe,
        target: str | None = None,
        export: Sequence[str] = (),
        output_dir: str | Path | None = None,
        score: bool = True,
        score_batches: int = 256,
        metrics: Sequence[str] = (),
        on_failure: str = "raise",
        start_step: int = 0,
        freeze_observers_step: int | None = None,
        convert: bool = True,
    ) -> None:
        """
        Args:
            recipe, target, export, output_dir, score, score_batches, metrics, on_failure: see
                :class:`QuantizationCallback`.
            start_step: optimizer step from which the forward pass rounds; before it training is float
                (observers already look).
            freeze_observers_step: optimizer step from which static activation ranges stay; None for never.
            convert: convert, score and export at the end of fit.
        """
        super().__init__(recipe, target, export, output_dir, score, score_batches, metrics, on_failure)
        if start_step < 0:
            raise QawareError(f"start_step: {start_step} must be 0 or more")
        if freeze_observers_step is not None and freeze_observers_step < 1:
            raise QawareError(f"freeze_observers_step: {freeze_observers_step} must be at least 1, or None")
        self.start_step = start_step
        self.freeze_observers_step = freeze_observers_step
        self.convert = convert
        self._task: Task | None = None

    @property
    def state_key(self) -> str:
        """One QAT callback a Trainer; its state is the recipe, the schedule follows from the step."""
        return "qaware.QuantizationAwareTraining"

    def state_dict(self) -> dict[str, Any]:
        """Plain data, readable by the next version."""
        return {"recipe_hash": self.recipe.hash}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare before the optimizer exists, before a checkpoint is restored, before any wrapping."""
        fit = stage == "fit"
        if fit and any(True for _ in pl_module.parameters()):
            self._prepare(pl_module)

        def configure_model(module: pl.LightningModule, original: Any) -> None:
            original()
            if fit:
                self._prepare(module)

        override(pl_module, "configure_model", configure_model)
        override(pl_module, "on_load_checkpoint", self._on_module_load)
        override(pl_module, "on_save_checkpoint", _on_module_save)

    def _prepare(self, pl_module: pl.LightningModule) -> None:
        state = get_state(pl_module)
        if state is not None:
            require_same_recipe(to_checkpoint(state), self.recipe)
            return
        plan = self.make_plan(pl_module)
        ModulesEngine().prepare(find_target(pl_module, self.target), plan)
        set_state(pl_module, QuantizationState(PREPARED, plan, self.target))

    def _on_module_load(self, module: pl.LightningModule, original: Any, checkpoint: dict[str, Any]) -> None:
        """The last moment before the weights are loaded: give the module the checkpoint's structure."""
        saved = checkpoint.get(KEY)
        if saved is not None:
            require_same_recipe(saved, self.recipe)
            self._prepare(module)
        elif get_state(module) is not None and "state_dict" in checkpoint:
            _add_observer_keys(module, checkpoint["state_dict"])
        original(checkpoint)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the float model that training starts from; on a resume it is gone, and is not measured."""
        self._set_phase(trainer, pl_module, observing=False)
        if not self.convert:
            return
        # Building loaders and iterating them draws random numbers; the training must not notice.
        with torch.random.fork_rng(devices=[]):
            self._task = self.make_task(trainer, pl_module)
            if (
                self._task is not None
                and self.score
                and trainer.global_step == 0
                and self.float_model is None
            ):
                self._measure_float(trainer, pl_module)

    def _measure_float(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.float_model = find_target(detached_copy(pl_module), self.target)
        set_fake_quant(self.float_model, False)
        pipeline = self.make_pipeline(trainer, self._task)
        pipeline.score_module(self.float_label, "float", self.float_model, float_bytes(self.float_model))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Observers see training batches only."""
        self._set_phase(trainer, pl_module, observing=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Observers off, and equal on every rank."""
        self._set_phase(trainer, pl_module, observing=False)
        all_reduce(pl_module)

    def _set_phase(self, trainer: pl.Trainer, pl_module: pl.LightningModule, observing: bool) -> None:
        """Flags as a function of the step alone, so that a resume lands where it left."""
        step = trainer.global_step
        set_fake_quant(pl_module, step >= self.start_step)
        frozen = self.freeze_observers_step is not None and step >= self.freeze_observers_step
        for observer in observers(pl_module):
            observer.observing = observing and not frozen

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert, score and export a copy."""
        state = get_state(pl_module)
        if not self.convert or state is None:
            return
        set_fake_quant(pl_module, True)
        prepared = detached_copy(pl_module)
        pipeline = self.make_pipeline(trainer, self._task)
        target = find_target(prepared, self.target)
        score = pipeline.score_module(self.label, "prepared", target, float_bytes(target))
        self.convert_and_export(trainer, pipeline, prepared, state.plan)
        if self.result is not None and score is not None:
            self.result.scores["prepared"] = score

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Lightning skips teardown then, so the overrides are removed here."""
        restore(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the overrides."""
        restore(pl_module)


def _on_module_save(module: pl.LightningModule, original: Any, checkpoint: dict[str, Any]) -> None:
    """Mark the checkpoint; the module's hook also runs for weights-only checkpoints."""
    state = get_state(module)
    if state is not None:
        checkpoint[KEY] = to_checkpoint(state)
    original(checkpoint)


def _add_observer_keys(module: pl.LightningModule, saved: dict[str, Any]) -> None:
    """A float checkpoint has no observer statistics; fresh ones stand in, so that loading stays strict."""
    own = module.state_dict()
    for name, child in module.named_modules():
        if child in set(observers(module)):
            for key in child.state_dict():
                saved.setdefault(f"{name}.{key}", own[f"{name}.{key}"])
