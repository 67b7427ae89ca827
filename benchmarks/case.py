"""One model with its data, and every way of quantizing it, scored by one protocol."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger

from qaware.callbacks import PostTrainingQuantization, QuantizationAwareTraining
from qaware.callbacks.base import QuantizationCallback
from qaware.callbacks.data import make_task
from qaware.callbacks.nested import detached_copy
from qaware.engines.base import float_bytes
from qaware.lm import CausalLM, TextDataModule
from qaware.metrics.score import Score, paired
from qaware.pipeline import Pipeline
from qaware.report.ledger import Comparison, Ledger

FLOAT = "float"
CALIBRATION_BATCHES = 16


class Case:
    """A float model, and the models that are made of it, by label."""

    def __init__(self, name: str, model: CausalLM, data: TextDataModule, folder: Path, seed: int) -> None:
        """
        Args:
            name: in the table.
            model: float, trained.
            data: its training text, for fine-tuning and calibration, and the windows to score.
            folder: for logs and artifacts.
            seed: of every training.
        """
        self.name, self.data, self.folder, self.seed = name, data, folder, seed
        self.ledger = Ledger()
        self.models: dict[str, CausalLM] = {}
        trainer = self._trainer(limit_val_batches=1)
        trainer.validate(model, datamodule=data, verbose=False)
        self.task: Any = make_task(trainer, detached_copy(model), None, (), 0)
        self.add_float(FLOAT, model)

    @property
    def fingerprint(self) -> str:
        """Of the protocol of every score."""
        return self.score(FLOAT, "float").fingerprint

    def add_float(self, label: str, model: CausalLM) -> None:
        """Score a float model, which others are then measured against."""
        self.models[label] = model
        module = detached_copy(model)
        Pipeline(self.ledger, self.task, [], self.folder, label).score_module(
            label, "float", module, float_bytes(module)
        )

    def finetune(self, label: str, steps: int, lr: float, source: str = FLOAT) -> None:
        """A float control: ``source`` with as many further steps as QAT gets, on the same batches."""
        model, trainer = self._finetuner(steps, lr, source, [])
        trainer.fit(model, datamodule=self.data)
        self.add_float(label, model)

    def ptq(
        self,
        label: str,
        recipe: Any,
        base: str = FLOAT,
        export: Sequence[str] = (),
        batches: int = CALIBRATION_BATCHES,
    ) -> None:
        """Post-training quantization of the float model ``base``, calibrated on ``batches``."""
        ptq = PostTrainingQuantization(recipe, export=export, on_failure="warn", calibration_batches=batches)
        self._connect(ptq, label, base)
        self._trainer([ptq], limit_val_batches=1).validate(
            self.models[base], datamodule=self.data, verbose=False
        )

    def qat(
        self,
        label: str,
        recipe: Any,
        base: str,
        steps: int,
        lr: float,
        export: Sequence[str] = (),
        source: str = FLOAT,
        **options: Any,
    ) -> None:
        """Quantization-aware training of ``source``, measured against its control ``base``."""
        qat = QuantizationAwareTraining(recipe, export=export, on_failure="warn", **options)
        self._connect(qat, label, base)
        model, trainer = self._finetuner(steps, lr, source, [qat])
        trainer.fit(model, datamodule=self.data)

    def score(self, label: str, stage: str = "converted") -> Score:
        """What was measured of a model in a stage.

        Raises:
            RuntimeError: an artifact failed, so that it has no score.
        """
        score = self.ledger.scores.get((label, stage))
        if score is None:
            failed = next(
                (r["failed"] for r in self.ledger.rows if r.get("failed") and r["model"] == label), ""
            )
            raise RuntimeError(f"{self.name}: {label} has no score in {stage}: {failed}")
        return score

    def loss(self, label: str, stage: str = "converted", base: str = FLOAT) -> float:
        """Nats above the float model ``base``."""
        return paired(self.score(label, stage), self.score(base, "float"))[0]

    def detail(self, label: str, stage: str = "converted", base: str = FLOAT) -> dict[str, Any]:
        """The figures of one model in one stage."""
        score = self.score(label, stage)
        difference, width = paired(score, self.score(base, "float"))
        plain = {
            "nats": score.nats,
            "d_nats": difference,
            "ci95": width,
            "ppl": score.perplexity,
            "kl": score.kl,
        }
        return {"model": label, "stage": stage, **{k: _finite(v) for k, v in plain.items()}}

    def _connect(self, callback: QuantizationCallback, label: str, base: str) -> None:
        callback.label, callback.ledger, callback.float_label = label, self.ledger, base
        callback.comparison, callback.output_dir = Comparison(base), self.folder / "artifacts"
        callback.float_model = detached_copy(self.models[base])

    def _finetuner(
        self, steps: int, lr: float, source: str, callbacks: list[pl.Callback]
    ) -> tuple[CausalLM, pl.Trainer]:
        pl.seed_everything(self.seed, workers=True, verbose=False)
        model: Any = detached_copy(self.models[source]).train()
        model.lr = model.hparams["lr"] = lr
        model.cosine = True
        return model, self._trainer(callbacks, max_steps=steps, limit_val_batches=0)

    def _trainer(self, callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            logger=CSVLogger(self.folder / "logs"),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            **options,
        )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@contextmanager
def quiet() -> Iterator[None]:
    """A benchmark makes dozens of Trainers, each of which would say what accelerators there are."""
    loggers = [logging.getLogger(f"lightning.pytorch{name}") for name in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.(pytorch|fabric)\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
