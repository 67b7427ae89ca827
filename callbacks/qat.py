"""Quantization-aware training: train with the rounding in the forward pass, ship those integers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from qaware.callbacks.averages import averages, expect_override
from qaware.callbacks.base import QuantizationCallback, refuse_double
from qaware.callbacks.batch_norm import refuse_sync, share_statistics
from qaware.callbacks.data import find_target
from qaware.callbacks.distillation import Distillation, float_copy, require_loss
from qaware.callbacks.hooks import override, restore
from qaware.callbacks.nested import detached_copy
from qaware.callbacks.prepared import is_built, require_continuation
from qaware.callbacks.restoring import add_missing_keys, apply_plan, require_in_time, restore_structure
from qaware.callbacks.scales import begin_scales, refuse_float_optimizer, report_idle
from qaware.callbacks.schedule import Schedule
from qaware.callbacks.state import KEY, get_state, require_same_recipe
from qaware.callbacks.strategies import refuse_flat, require_prepared
from qaware.engines.base import float_bytes
from qaware.engines.fake_quant import is_rounding, set_fake_quant, set_softness
from qaware.exporters.check import require_legal
from qaware.observers import all_reduce
from qaware.parity_levels import DEFAULT
from qaware.plan import Plan
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
        export: Sequence[str | dict[str, Any]] = (),
        output_dir: str | Path | None = None,
        score: bool = True,
        score_batches: int = 256,
        metrics: Sequence[str] = (),
        on_failure: str = "raise",
        engine: str = "auto",
        start_step: int = 0,
        freeze_observers_step: int | None = None,
        freeze_batch_norm_step: int | None = None,
        convert: bool = True,
        distillation: float = 0.0,
        anneal_steps: int = 0,
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
            start_step: optimizer step from which the forward pass rounds; before it training is float
                (observers already look).
            freeze_observers_step: optimizer step from which static activation ranges stay; None for never.
            freeze_batch_norm_step: optimizer step from which batch norms use their running statistics, as the
                converted model does, and no longer move them; None for never.
            convert: convert, score and export at the end of fit.
            distillation: share of the loss, 0 to 1, that is the divergence from the outputs of the float
                model of ``start_step``, instead of your own loss.
            anneal_steps: optimizer steps from ``start_step`` in which the rounding hardens little by little
                (PARQ, Jin et al. 2025, arXiv:2503.15748); what is converted is always rounded.
            parity: how close an artifact must be to the converted model: ``default``, or a level of
                :mod:`qaware.parity_levels`.
        """
        super().__init__(
            recipe, target, export, output_dir, score, score_batches, metrics, on_failure, engine, parity
        )
        self.schedule = Schedule(start_step, anneal_steps, freeze_observers_step, freeze_batch_norm_step)
        self.start_step = start_step
        self.convert = convert
        self._teacher = Distillation(distillation, target)
        self.distillation = self._teacher.weight
        self._task: Task | None = None
        self._plan: Plan | None = None
        self._begun = False
        self._was_rounding = False

    @property
    def state_key(self) -> str:
        """One QAT callback a Trainer; its state is the recipe, the schedule follows from the step."""
        return "qaware.QuantizationAwareTraining"

    def state_dict(self) -> dict[str, Any]:
        """Plain data, readable by the next version."""
        return {"recipe_hash": self.recipe.hash, **self._teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The float model to learn from; the schedule needs no state."""
        if self.distillation:
            self._teacher.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare before the optimizer exists, before a checkpoint is restored, before any wrapping."""
        if self._module is None or self._module() is not pl_module:
            self._teacher.forget()
        super().setup(trainer, pl_module, stage)
        self._begun = self._was_rounding = False
        if stage == "fit":
            self._setup_fit(trainer, pl_module)
        override(pl_module, "on_load_checkpoint", self._on_module_load)

    def _setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_double(trainer)
        refuse_flat(trainer)
        require_prepared(trainer, pl_module)
        require_continuation(pl_module, self.recipe, self.target)
        if self.distillation:
            require_loss(pl_module)
        if self.recipe.rounds:
            rank_zero_info(
                f"qaware: rounding: {self.recipe.rounding_label} is for PTQ; QAT rounds to nearest as it "
                "trains"
            )

        def configure_model(module: pl.LightningModule, original: Any) -> None:
            original()
            if is_built(module):  # else called by an averaging callback, before LightningModule.setup
                self._prepare(trainer, module)
                for average in averages(trainer, module):
                    self._prepare_average(average)

        if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):
            # Nothing is built later, and averaging callbacks after this one shall copy a prepared model.
            self._prepare(trainer, pl_module)
            expect_override()
        override(pl_module, "configure_model", configure_model)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare what is not prepared yet; Lightning may call ``configure_model`` several times."""
        state = get_state(pl_module)
        if state is not None and state.plan.layout is not None:
            require_legal(state.plan, self.exporters)
            self._plan = state.plan
            return
        if state is not None and state.plan is self._plan:
            now = self.recipe.match(find_target(pl_module, self.target))
            if now.quantized.keys() <= state.plan.quantized.keys():
                return
        self._plan = self.make_plan(trainer, pl_module)
        refuse_sync(trainer, self._plan)
        apply_plan(pl_module, self._plan, self.target)

    def _prepare_average(self, average: pl.LightningModule) -> None:
        if get_state(average) is None and self._plan is not None:
            apply_plan(average, self._plan, self.target)

    def _on_module_load(self, module: pl.LightningModule, original: Any, checkpoint: dict[str, Any]) -> None:
        """The last moment before the weights are loaded: give the module the checkpoint's structure."""
        saved = checkpoint.get(KEY)
        if saved is not None:
            theirs = Recipe.from_dict(saved["recipe"])
            require_same_recipe("checkpoint", theirs, saved["target"], self.recipe, self.target)
            require_in_time(module)
            restore_structure(module, checkpoint)
            self._was_rounding = is_rounding(module)
        elif get_state(module) is not None:
            refuse_float_optimizer(module, checkpoint, self.recipe)
            add_missing_keys(module, checkpoint)
        original(checkpoint)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A model without a single layer says so."""
        if get_state(pl_module) is None:
            self._prepare(trainer, pl_module)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The sanity check computes what the first training step will."""
        self._set_phase(trainer, pl_module, observing=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out what is scored, before anything expensive."""
        self._set_phase(trainer, pl_module, observing=False)
        report_idle(trainer, pl_module)
        if self.convert:
            # Building loaders and iterating them draws random numbers; the training must not notice.
            with isolate_rng():
                self._task = self.make_task(trainer, pl_module)
        self._begin(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the teacher before the model is copied and scored."""
        self._teacher.detach()

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once, when the forward pass begins to round: what was trained so far is the float model, which is
        measured and learned from. After a resume in that phase it is gone."""
        if self._begun or trainer.global_step < self.start_step:
            return
        self._begun = True
        gone = self._was_rounding and trainer.global_step > self.start_step
        if not gone:
            self._measure_float(trainer, pl_module)
        if self.distillation:
            self._teacher.attach(pl_module, None if gone else float_copy(pl_module, self.target))

    def _measure_float(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.score or self._task is None or self.float_model is not None:
            return
        self.float_model = float_copy(pl_module, self.target)
        with isolate_rng():
            self.make_pipeline(trainer, self._task).score_module(
                self.float_label, "float", self.float_model, float_bytes(self.float_model)
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Observers see training batches only."""
        self._begin(trainer, pl_module)
        self._set_phase(trainer, pl_module, observing=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Observers off, and equal on every rank."""
        self._set_phase(trainer, pl_module, observing=False)
        all_reduce(pl_module)

    def _set_phase(self, trainer: pl.Trainer, pl_module: pl.LightningModule, observing: bool) -> None:
        """Flags as a function of the step alone, so that a resume lands where it left."""
        step = trainer.global_step
        self.schedule.set_phase(pl_module, self.target, step, observing)
        if self.schedule.rounds(step) and self.recipe.learning != "none":
            begin_scales(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert, score and export a copy."""
        state = get_state(pl_module)
        if not self.convert or state is None:
            return
        if not self._begun and self._task is None:  # resumed when it was over: nothing has started
            with isolate_rng():
                self._task = self.make_task(trainer, pl_module)
        if not self._begun and not self._was_rounding:  # ended before start_step
            self._measure_float(trainer, pl_module)
        set_fake_quant(pl_module, True)
        set_softness(pl_module, 0.0)
        share_statistics(pl_module)
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
        self._teacher.detach()
        restore(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the overrides."""
        restore(pl_module)
