"""One run of an experiment: train, quantize, export, score, report, each into the run folder."""

from __future__ import annotations

import dataclasses
import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger

from qaware import machine
from qaware.callbacks import PostTrainingQuantization, QuantizationAwareTraining
from qaware.callbacks.base import QuantizationCallback
from qaware.callbacks.carried import carry_inputs
from qaware.callbacks.data import make_task
from qaware.callbacks.nested import detached_copy
from qaware.callbacks.progress import trainer_progress
from qaware.config import arguments_of, build
from qaware.engines.base import float_bytes
from qaware.errors import QawareError
from qaware.experiment import Experiment, Quantize, build_model, check_plans
from qaware.exporters.base import first_line
from qaware.files import write_json, write_text
from qaware.pipeline import Pipeline
from qaware.report.ledger import Comparison, Ledger
from qaware.report.write import RESULTS, write_report

FLOAT, CONTROL = "float", "float control"


class Run:
    """One run of an experiment, in its own folder."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.folder = _new_folder(Path(experiment.output) / experiment.name)
        self.ledger = Ledger(self.folder / RESULTS)
        self.metadata: dict[str, Any] = {}
        self._labels: Counter[str] = Counter()
        resolved = yaml.safe_dump(dataclasses.asdict(experiment), sort_keys=False)
        write_text(self.folder / "config.yaml", resolved)
        self._status("not finished")

    def execute(self) -> Path:
        """Everything; what is finished stays readable whatever happens.

        Raises:
            QawareError: of a stage; the report of the finished ones is written first.
        """
        try:
            self._stages()
        except BaseException as error:
            self._status(f"not finished ({type(error).__name__})")
            if self.ledger.rows:
                write_report(self.folder, self.ledger.rows)
            raise
        self._status("finished")
        return write_report(self.folder, self.ledger.rows)

    def _stages(self) -> None:
        experiment = self.experiment
        model = build_model(experiment)
        data = build("data", experiment.data, pl.LightningDataModule)
        check_plans(experiment, model)
        self._train_float(model, data)
        self._quantize_all(model, data)

    def _quantize_all(self, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
        """Every entry of the experiment, by its methods, and the float control where one trains.

        Raises:
            QawareError: the first failure of an artifact, when all is done.
        """
        experiment = self.experiment
        base, label = model, FLOAT
        if experiment.uses_qat:
            base, label = self._train_control(model, data), CONTROL
        failures = []
        for entry in experiment.quantize:
            ptq = self._ptq(entry, base, data, label)
            failures += list(ptq.result.failures.values()) if ptq.result else []
            if "qat" in entry.methods:
                qat = self._qat(entry, model, data, ptq)
                failures += list(qat.result.failures.values()) if qat.result else []
        if failures and experiment.on_failure == "raise":
            raise failures[0]

    def _train_float(self, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
        _say(f"{FLOAT}: " + ("taken as it is" if self.experiment.trainer is None else "training"))
        # Without training one validation batch is enough: it attaches the data and checks that they fit.
        trainer = self._trainer(self.experiment.trainer or {"limit_val_batches": 1}, FLOAT)
        if self.experiment.trainer is None:
            trainer.validate(model, datamodule=data, verbose=False)
        else:
            trainer.fit(model, datamodule=data)
        self._keep(trainer, FLOAT)
        self._keep_data(data)
        self._score_float(trainer, model, FLOAT)

    def _train_control(self, model: pl.LightningModule, data: pl.LightningDataModule) -> pl.LightningModule:
        """The float model with as many further steps as QAT gets, on the same batches."""
        _say(f"{CONTROL}: training as long as QAT will")
        control, trainer = self._finetuner(model, CONTROL, [])
        trainer.fit(control, datamodule=data)
        self._keep(trainer, CONTROL)
        self._score_float(trainer, control, CONTROL)
        return control

    def _ptq(
        self, entry: Quantize, base: pl.LightningModule, data: pl.LightningDataModule, label: str
    ) -> PostTrainingQuantization:
        ptq = entry.ptq(self.experiment.metrics)
        self._connect(ptq, Comparison(label))
        _say(f"{ptq.label}: {', '.join(['convert', *(exporter.name for exporter in ptq.exporters)])}")
        trainer = self._trainer({"limit_val_batches": 1}, ptq.label, [ptq])
        trainer.validate(base, datamodule=data, verbose=False)
        return ptq

    def _qat(
        self,
        entry: Quantize,
        model: pl.LightningModule,
        data: pl.LightningDataModule,
        ptq: PostTrainingQuantization,
    ) -> QuantizationAwareTraining:
        qat = entry.qat(self.experiment.metrics)
        self._connect(qat, Comparison(CONTROL, ptq.label))
        qat.float_model = ptq.float_model
        runtimes = [exporter.name for exporter in qat.exporters]
        _say(f"{qat.label}: training, then {', '.join(['convert', *runtimes])}")
        copied, trainer = self._finetuner(model, qat.label, [qat])
        trainer.fit(copied, datamodule=data)
        self._keep(trainer, qat.label)
        return qat

    def _connect(self, callback: QuantizationCallback, comparison: Comparison) -> None:
        """Let a callback write into this run's table. Entries whose labels are the same get numbers, so that
        none overwrites the files of another."""
        self._labels[callback.label] += 1
        if (count := self._labels[callback.label]) > 1:
            callback.label += f" {count}"
        callback.ledger, callback.comparison = self.ledger, comparison
        callback.float_label = comparison.base
        callback.output_dir, callback.metadata = self.folder / "artifacts", self.metadata

    def _finetuner(
        self, model: pl.LightningModule, label: str, callbacks: list[pl.Callback]
    ) -> tuple[pl.LightningModule, pl.Trainer]:
        finetune = self.experiment.finetune
        assert finetune is not None
        pl.seed_everything(self.experiment.seed, workers=True, verbose=False)
        copied = detached_copy(model).train()
        if finetune.lr is not None:
            _set_lr(copied, finetune.lr)
        options = {
            k: v for k, v in (self.experiment.trainer or {}).items() if k not in ("max_epochs", "max_time")
        }
        return copied, self._trainer({**options, "max_steps": finetune.max_steps}, label, callbacks)

    def _trainer(
        self, options: dict[str, Any], label: str, callbacks: list[pl.Callback] | None = None
    ) -> pl.Trainer:
        options = dict(options)
        own = [build("trainer.callbacks", c, pl.Callback) for c in _listed(options.pop("callbacks", None))]
        specs = _listed(options.pop("logger", None))
        loggers = [build("trainer.logger", spec, Logger) for spec in specs]  # type: ignore[type-abstract]
        defaults = {"enable_checkpointing": False, "enable_model_summary": False, "log_every_n_steps": 10}
        arguments = arguments_of(pl.Trainer, "trainer", {**defaults, **options}, {"logger", "callbacks"})
        kept = loggers or CSVLogger(self.folder / "logs", name=label.replace(" ", "-"), version="")
        try:
            return pl.Trainer(**arguments, logger=kept, callbacks=[*own, *(callbacks or [])])
        except Exception as error:  # Lightning raises many kinds; all of them are about the arguments
            raise QawareError(f"trainer: {' '.join(str(error).split())}") from error

    def _score_float(self, trainer: pl.Trainer, model: pl.LightningModule, label: str) -> None:
        module = detached_copy(model)
        task = make_task(trainer, module, None, self.experiment.metrics, batches=256)
        Pipeline(
            ledger=self.ledger,
            task=task,
            exporters=[],
            folder=self.folder / "artifacts",
            label=label,
            comparison=None if label == FLOAT else Comparison(FLOAT),
            progress=trainer_progress(trainer),
        ).score_module(label, "float", module, float_bytes(module))

    def _keep(self, trainer: pl.Trainer, label: str) -> None:
        path = self.folder / "checkpoints" / f"{label.replace(' ', '-')}.ckpt"
        try:
            trainer.save_checkpoint(path, weights_only=True)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise QawareError(f"{path}: cannot be written ({first_line(error)})") from error

    def _keep_data(self, data: pl.LightningDataModule) -> None:
        """How data become inputs, with the artifacts, so that ``qaware evaluate`` needs nothing else."""
        arguments = self.experiment.data.get("init_args", {})
        self.metadata = carry_inputs(data, self.folder / "artifacts", arguments)

    def _status(self, status: str) -> None:
        about = {
            "name": self.experiment.name,
            "status": status,
            "versions": machine.versions(),
            "cpu": machine.cpu(),
        }
        write_json(self.folder / "run.json", about)


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given] if given else []


def _say(text: str) -> None:
    print(f"qaware: {text}", flush=True)


def _set_lr(model: pl.LightningModule, lr: float) -> None:
    if "lr" not in model.hparams and not hasattr(model, "lr"):
        raise QawareError(
            f"finetune.lr: {type(model).__name__} has no lr hyperparameter; leave finetune.lr out"
        )
    if "lr" in model.hparams:
        model.hparams["lr"] = lr
    if hasattr(model, "lr"):
        object.__setattr__(model, "lr", lr)


def _new_folder(base: Path) -> Path:
    """``<base>/<time>``, made; a second run in the same second gets a number."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for name in (stamp, *(f"{stamp}-{i}" for i in range(1, 100))):
        try:
            (base / name).mkdir(parents=True)
            return base / name
        except FileExistsError:
            continue
        except OSError as error:
            raise QawareError(
                f"output: {base} cannot be written ({error.strerror}); set output= another folder"
            ) from error
    raise QawareError(f"output: {base} has a hundred runs of this second; set output= another folder")
