"""Post-training quantization: calibrate, convert, score, export, once the Trainer is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from qaware.calibration import Look, calibrate, require_loader, same_draws
from qaware.calibration_checks import DEFAULT_BATCHES, require_enough
from qaware.callbacks.base import QuantizationCallback, refuse_double
from qaware.callbacks.calibrating import CalibrationStep, shared
from qaware.callbacks.data import find_target, raw_loader
from qaware.callbacks.nested import detached_copy, validate
from qaware.callbacks.strategies import refuse_flat
from qaware.engines.base import float_bytes
from qaware.engines.choose import engine_for
from qaware.errors import QawareError
from qaware.parity_levels import DEFAULT
from qaware.pipeline import Pipeline
from qaware.plan import Plan
from qaware.recipe import Recipe
from qaware.tasks import Task


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
        export: Sequence[str | dict[str, Any]] = (),
        output_dir: str | Path | None = None,
        score: bool = True,
        score_batches: int = 256,
        metrics: Sequence[str] = (),
        on_failure: str = "raise",
        engine: str = "auto",
        calibration: Any = None,
        calibration_batches: int | None = None,
        parity: str = DEFAULT,
    ) -> None:
        """
        Args:
            recipe: name, path of a YAML file, plain data, or a :class:`qaware.Recipe`.
            target: name of the submodule to quantize and export; None for the whole module.
            export: runtimes, e.g. ``["executorch", "aoti", "tract"]``; one with options of its exporter as
                ``{"aoti": {"cache_length": 512}}``.
            output_dir: for artifacts and the report; default ``quantized`` in the Trainer's log folder.
            score: measure before and after; needs validation data.
            score_batches: validation batches that are scored at most.
            metrics: further ``evaluate`` metrics, by name or path.
            on_failure: ``raise`` at the end when an artifact fails, or ``warn``.
            engine: ``auto``, ``modules``, ``eager`` or ``graph``.
            calibration: loader whose batches the validation step takes; default the training data, and
                without any the validation data. Only recipes with static activations, or with a rounding
                such as gptq, need it. Under several
                processes every one takes the whole loader, and observes its share of the batches.
            calibration_batches: how many batches are observed, by all processes together; an error where the
                data has fewer. None: up to 32.
            parity: how close an artifact must be to the converted model: ``default``, or a level of
                :mod:`qaware.parity_levels`.
        """
        super().__init__(
            recipe, target, export, output_dir, score, score_batches, metrics, on_failure, engine, parity
        )
        if calibration_batches is not None and calibration_batches < 1:
            raise QawareError(f"calibration_batches: {calibration_batches} must be at least 1")
        if calibration is not None:
            require_loader(calibration)
        if self.recipe.rounds:  # so that two roundings of one recipe are two models in a table
            self.label += f" {self.recipe.rounding_label}"
        self.calibration = calibration
        self.calibration_batches = calibration_batches
        self._plan: Plan | None = None
        self._loader: Any = None
        self._task: Task | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing of an earlier run counts."""
        super().setup(trainer, pl_module, stage)
        self._plan = self._task = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an impossible recipe before training."""
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an impossible recipe before validation, and take the calibration data while it is there: a
        datamodule may drop it when validation ends."""
        if trainer.state.fn != "validate":
            return
        self._begin(trainer, pl_module)
        if self._plan is not None and self._plan.needs_batches:
            # The loop runs in inference mode; data that is made here must be ordinary tensors.
            with torch.inference_mode(False), same_draws():
                self._loader = self._calibration_loader(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out what is scored and exported, before anything expensive."""
        with isolate_rng():
            self._task = self.make_task(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize what was trained."""
        if self._plan is not None and self._plan.needs_batches:
            with same_draws():
                self._loader = self._calibration_loader(trainer)
        self._quantize(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Quantize what was validated; here rather than at the end of validation, because the loop runs in
        inference mode and tensors made there cannot be converted or exported."""
        if stage == "validate" and self._plan is not None:  # None where no batch was validated
            self._quantize(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_double(trainer)
        refuse_flat(trainer)
        if getattr(pl_module, "qaware_state", None) is not None:
            raise QawareError(
                f"{type(pl_module).__name__}: was prepared for QAT; its result is in that callback, "
                "or give PTQ a float model"
            )
        plan = self.make_plan(trainer, pl_module)
        if plan.needs_batches and not is_overridden("validation_step", pl_module):
            raise QawareError(
                f"calibration: runs batches through validation_step, and {type(pl_module).__name__} has none"
                "; define it, or give the trained module to qaware.quantize"
            )
        self._plan = plan

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = self._plan
        assert plan is not None
        task = self._task or self.make_task(trainer, pl_module)
        self.float_model = find_target(detached_copy(pl_module), self.target)
        pipeline = self.make_pipeline(trainer, task)
        if (self.float_label, "float") not in pipeline.ledger.scores:
            pipeline.score_module(self.float_label, "float", self.float_model, float_bytes(self.float_model))
        prepared = detached_copy(pl_module)
        root = find_target(prepared, self.target)
        run_pass = self._pass(trainer, prepared, pipeline) if plan.needs_batches else _no_pass
        rounder = None
        if plan.recipe.rounds:
            from qaware.rounding.recording import record
            from qaware.rounding.rounder import Rounder

            rounder = Rounder(root, plan, lambda: record(root, run_pass))
            plan = rounder.plan
        engine_for(plan).prepare(root, plan)
        if plan.needs_calibration:
            calibrate(prepared, run_pass)
        self._loader = None
        if rounder is not None:
            twin = pipeline.before_rounding(root)
            with pipeline.progress("Rounding", len(plan.quantized)) as advance:
                pipeline.rounding = rounder.round(root, advance, twin)
        self.convert_and_export(trainer, pipeline, prepared, plan)

    def _pass(
        self, trainer: pl.Trainer, module: pl.LightningModule, pipeline: Pipeline
    ) -> Callable[[Look], None]:
        """Runs the user's validation step over the calibration batches, once for each call."""
        batches = self.calibration_batches or DEFAULT_BATCHES
        shares, loader = shared(self._loader, batches)
        steps = math.ceil(batches / trainer.world_size) * len(shares)
        example = None if pipeline.task is None else pipeline.task.example

        def run_pass(look: Look) -> None:
            with pipeline.progress("Calibrating", steps) as advance:
                step = CalibrationStep(shares, look, advance)
                try:
                    validate(module, loader, 1.0, [step])
                except QawareError:
                    raise
                except Exception as error:  # whatever the user's step makes of a batch that it does not know
                    raise QawareError(step.failed(example, error)) from error
            line = require_enough(sum(share.used for share in shares), self.calibration_batches)
            if line and look.index == 0:
                rank_zero_info(line)

        return run_pass

    def _calibration_loader(self, trainer: pl.Trainer) -> Any:
        if self.calibration is not None:
            return self.calibration
        datamodule = getattr(trainer, "datamodule", None)
        if trainer.state.fn == "validate" and datamodule and is_overridden("train_dataloader", datamodule):
            datamodule.setup("fit")  # Lightning set up the validation part only
        if datamodule is not None and hasattr(datamodule, "calibration_dataloader"):  # without augmentation
            return datamodule.calibration_dataloader()
        loader = raw_loader(trainer, "train")
        if loader is not None:
            return loader
        rank_zero_info(
            f"qaware: {self.recipe.name} is calibrated on the validation data, which is also what is scored, "
            "because there is no training data; give calibration= other data"
        )
        return raw_loader(trainer, "val")


def _no_pass(look: Look) -> None:
    """For recipes that look at no data."""
