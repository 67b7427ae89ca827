"""What both callbacks share: their arguments, the pipeline that they drive, and where results go."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from qaware.callbacks.carried import carry_inputs
from qaware.callbacks.data import find_target, make_task
from qaware.callbacks.examples import find_example
from qaware.callbacks.loggers import log_rows
from qaware.callbacks.nested import detached_copy
from qaware.callbacks.progress import trainer_progress
from qaware.callbacks.state import CONVERTED, QuantizationState, set_state
from qaware.engines.choose import ENGINES, lay_out
from qaware.errors import QawareError
from qaware.exporters import get_exporters
from qaware.exporters.base import require_wide
from qaware.exporters.check import require_legal
from qaware.metrics.hub import load_extra
from qaware.parity_levels import DEFAULT, require_level
from qaware.pipeline import Pipeline, QuantizationResult, predictor, save_plan
from qaware.plan import Plan
from qaware.recipe import Recipe
from qaware.report.ledger import Comparison, Ledger
from qaware.report.table import print_table
from qaware.report.write import RESULTS, write_report
from qaware.tasks import Task

FOLDER = "quantized"


class QuantizationCallback(Callback):
    """Arguments that both callbacks take; see them for the use."""

    method = ""

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
        parity: str = DEFAULT,
    ) -> None:
        """
        Args:
            recipe: name, path of a YAML file, plain data, or a :class:`qaware.Recipe`.
            target: name of the submodule to quantize and export; None for the whole module.
            export: runtimes, e.g. ``["executorch", "aoti", "tract"]``; one with options of its exporter as
                ``{"aoti": {"cache_length": 512}}``.
            output_dir: for artifacts, ``results.jsonl`` and the report; default ``quantized`` in the
                Trainer's log folder, with a number when there is one already.
            score: measure before and after; needs validation data.
            score_batches: validation batches that are scored at most (a datamodule with ``windows()``
                decides for itself).
            metrics: further ``evaluate`` metrics, by name or path.
            on_failure: ``raise`` when an artifact fails parity or its runtime dies (after everything
                else is done and written), or ``warn``.
            engine: ``auto`` chooses by recipe and runtimes and says so; see :mod:`qaware.engines.choose`.
            parity: how close an artifact must be to the converted model: ``default``, as the runtime's own
                tolerance says, or a level of :mod:`qaware.parity_levels`.
        """
        if on_failure not in ("raise", "warn"):
            raise QawareError(f"on_failure: {on_failure!r} is not one of raise, warn")
        if engine not in ENGINES:
            raise QawareError(f"engine: {engine!r} is not one of {', '.join(ENGINES)}")
        if score_batches < 1:
            raise QawareError(
                f"score_batches: {score_batches} must be at least 1; use score=False for no score"
            )
        self.recipe = Recipe.load(recipe)
        self.target = target
        self.exporters = get_exporters(export)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.score = score
        self.score_batches = score_batches
        self.metrics = tuple(metrics)
        self.on_failure = on_failure
        self.engine = engine
        self.parity = require_level(parity)
        self.result: QuantizationResult | None = None
        """What came of it, once the Trainer is done."""
        self.label = f"{self.recipe.name} {self.method}"
        # An experiment sets these, so that all its models share one table and one float model.
        self.float_model: nn.Module | None = None
        self.ledger: Ledger | None = None
        self.comparison: Comparison | None = None
        self.metadata: dict[str, Any] = {}
        self.float_label = "float"
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._given: tuple[nn.Module | None, Ledger | None, Path | None] = (None, None, None)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what belongs to another model: one callback may serve several in turn."""
        if self._module is None:
            self._given = (self.float_model, self.ledger, self.output_dir)
        elif self._module() is not pl_module:
            self.float_model, self.ledger, self.output_dir = self._given
            self.result = None
        self._module = weakref.ref(pl_module)

    def make_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Plan:
        """Match the recipe, choose the engine, lay out where activations are rounded, and refuse, before
        anything expensive, what cannot work."""
        load_extra(self.metrics)
        root = find_target(pl_module, self.target)
        plan = self.recipe.match(root)
        require_legal(plan, self.exporters)
        runtimes = [exporter.name for exporter in self.exporters]
        plan, choice = lay_out(
            plan,
            root,
            lambda: find_example(trainer, pl_module, self.target),
            runtimes,
            self.engine,
            training=self.method == "qat",
        )
        rank_zero_info(plan.summary())
        rank_zero_info(f"qaware: engine {choice.engine} ({choice.reason})")
        return plan

    def make_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Task | None:
        """What is scored and exported; None when neither is asked for."""
        if not (self.score or self.exporters):
            return None
        # A dry run is to be quick: Lightning's own limit then says how many batches it takes.
        batches = (
            int(trainer.limit_val_batches) if getattr(trainer, "fast_dev_run", False) else self.score_batches
        )
        task = make_task(trainer, detached_copy(pl_module), self.target, self.metrics, batches)
        if task is None and self.exporters:
            raise QawareError(
                "export: needs one batch of tensors that enter the model, and validation gave none; give the "
                "Trainer a val_dataloader, or target= a submodule that takes tensors"
            )
        if task is not None and self.exporters:
            require_wide(task.signature)
        if task is None:
            rank_zero_info("qaware: nothing to score on, so the model is quantized but not scored")
        return task

    def make_pipeline(self, trainer: pl.Trainer, task: Task | None) -> Pipeline:
        """The steps after prepare, bound to this Trainer's folder, ranks and progress bar."""
        folder = self.folder(trainer)
        if self.ledger is None:
            self.ledger = Ledger(folder / RESULTS if trainer.is_global_zero else None)
        reference = None
        if self.float_model is not None and task is not None:
            reference = predictor(self.float_model, task)
        return Pipeline(
            ledger=self.ledger,
            task=task,
            exporters=self.exporters,
            folder=folder,
            label=self.label,
            comparison=self.comparison or Comparison(self.float_label),
            reference=reference,
            metadata=self._carried(trainer, folder),
            progress=trainer_progress(trainer),
            rank=trainer.global_rank,
            world=trainer.world_size,
            parity=self.parity,
        )

    def _carried(self, trainer: pl.Trainer, folder: Path) -> dict[str, Any]:
        """Tokenizer or preprocessing, beside the artifacts, where the data have one."""
        if self.metadata or not (self.exporters and trainer.is_global_zero):
            return self.metadata
        return carry_inputs(getattr(trainer, "datamodule", None), folder)

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where files go; chosen once, and never one that an earlier run filled."""
        if self.output_dir is None:
            base = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
            names = [base, *(base.with_name(f"{FOLDER}-{i}") for i in range(1, 10_000))]
            self.output_dir = next(name for name in names if not name.exists())
        return self.output_dir

    def convert_and_export(
        self, trainer: pl.Trainer, pipeline: Pipeline, prepared: pl.LightningModule, plan: Plan
    ) -> None:
        """Convert the copy ``prepared``, export, score, and report; sets ``result``."""
        result = pipeline.convert(find_target(prepared, self.target), plan)
        set_state(prepared, QuantizationState(CONVERTED, plan, self.target))
        self.result = result
        if not getattr(trainer, "fast_dev_run", False):
            pipeline.export_all(result)
        trainer.strategy.barrier("qaware export")
        result.rows = [row for row in pipeline.ledger.rows if row["model"] in (self.label, self.float_label)]
        if trainer.is_global_zero:
            self._publish(trainer, pipeline, result)
        if result.failures and self.on_failure == "raise":
            raise next(iter(result.failures.values()))

    def _publish(self, trainer: pl.Trainer, pipeline: Pipeline, result: QuantizationResult) -> None:
        """Files, loggers and, unless an experiment prints its own, the table on the terminal."""
        save_plan(result.plan, pipeline.folder / f"{self.label.replace(' ', '-')}.plan.json")
        log_rows(trainer, result.rows)
        if pipeline.ledger.path == pipeline.folder / RESULTS:
            write_report(pipeline.folder, pipeline.ledger.rows)
            print_table(pipeline.ledger.rows)


def refuse_double(trainer: pl.Trainer) -> None:
    """Refuse ``precision="64-true"``, which makes weights that no quantizer takes.

    Raises:
        QawareError: names the precisions that work.
    """
    if trainer.precision == "64-true":
        raise QawareError(
            "precision: '64-true' makes float64 weights, which cannot be quantized; "
            "use 32-true, 16-mixed, bf16-mixed or bf16-true"
        )
