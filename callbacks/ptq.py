"""Post-training quantization: calibrate, convert, score, export, once the Trainer is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from qaware.callbacks.base import QuantizationCallback
from qaware.callbacks.data import find_target
from qaware.callbacks.nested import detached_copy, validate
from qaware.engines.base import float_bytes
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.observers import all_reduce, observers
from qaware.pipeline import Pipeline
from qaware.plan import Plan
from qaware.recipe import Recipe


class PostTrainingQuantization(QuantizationCallback):
    """Quantize the model when ``Trainer.fit`` or ``Trainer.validate`` ends; the module itself stays float.

    Example::

        ptq = PostTrainingQuantization("int8-dynamic", export=["executorch"])
        Trainer(callbacks=[ptq]).validate(model, datamodule=data)
        ptq.result.model, ptq.result.scores, ptq.result.artifacts
    """

    method = "ptq"

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
        calibration: Any = None,
        calibration_batches: int = 32,
    ) -> None:
        """
        Args:
            recipe, target, export, output_dir, score, score_batches, metrics, on_failure: see
                :class:`QuantizationCallback`.
            calibration: loader whose batches the validation step takes; default the training data.
                Only recipes with static activations need it.
            calibration_batches: how many batches are observed.
        """
        super().__init__(recipe, target, export, output_dir, score, score_batches, metrics, on_failure)
        if calibration_batches < 1:
            raise QawareError(f"calibration_batches: {calibration_batches} must be at least 1")
        self.calibration = calibration
        self.calibration_batches = calibration_batches
        self._plan: Plan | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an impossible recipe before training."""
        self._plan = self._float_plan(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an impossible recipe before validation."""
        if trainer.state.fn == "validate":
            self._plan = self._float_plan(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize what was trained."""
        self._quantize(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Quantize what was validated; here rather than at the end of validation, because the loop runs in
        inference mode and tensors made there cannot be converted or exported."""
        if stage == "validate":
            self._quantize(trainer, pl_module)

    def _float_plan(self, pl_module: pl.LightningModule) -> Plan:
        if getattr(pl_module, "qaware_state", None) is not None:
            raise QawareError(
                f"{type(pl_module).__name__}: was prepared for QAT; its result is in that callback, "
                "or give PTQ a float model"
            )
        return self.make_plan(pl_module)

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = self._plan
        assert plan is not None
        task = self.make_task(trainer, pl_module)
        self.float_model = find_target(detached_copy(pl_module), self.target)
        pipeline = self.make_pipeline(trainer, task)
        if (self.float_label, "float") not in pipeline.ledger.scores:
            pipeline.score_module(self.float_label, "float", self.float_model, float_bytes(self.float_model))
        prepared = detached_copy(pl_module)
        ModulesEngine().prepare(find_target(prepared, self.target), plan)
        if plan.needs_calibration:
            self._calibrate(trainer, prepared, pipeline)
        self.convert_and_export(trainer, pipeline, prepared, plan)

    def _calibrate(self, trainer: pl.Trainer, prepared: pl.LightningModule, pipeline: Pipeline) -> None:
        """Run the user's validation step over calibration batches with the observers on, in float."""
        loader = self._calibration_loader(trainer)
        set_fake_quant(prepared, False)
        for observer in observers(prepared):
            observer.observing = True
        with pipeline.progress("Calibrating", self.calibration_batches) as advance:
            validate(prepared, loader, self.calibration_batches, [_Step(advance)])
        for observer in observers(prepared):
            observer.observing = False
        all_reduce(prepared)
        set_fake_quant(prepared, True)

    def _calibration_loader(self, trainer: pl.Trainer) -> Any:
        if self.calibration is not None:
            return self.calibration
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None:
            return datamodule.train_dataloader()
        if trainer.train_dataloader is not None:
            return trainer.train_dataloader
        raise QawareError(
            f"calibration: recipe {self.recipe.name!r} has static activations, and the Trainer has no "
            "training data to observe; give calibration= a loader"
        )


class _Step(pl.Callback):
    """Advances a bar after every batch."""

    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.advance()
