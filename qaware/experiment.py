"""What an experiment file holds, and everything about it that can be checked before it runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser

from qaware.callbacks import PostTrainingQuantization, QuantizationAwareTraining
from qaware.callbacks.data import find_target
from qaware.config import Config, build, parse
from qaware.errors import QawareError
from qaware.exporters import get_exporters
from qaware.exporters.check import require_legal
from qaware.metrics.hub import load_extra
from qaware.parity_levels import DEFAULT
from qaware.plan import Plan
from qaware.recipe import Recipe, Rule

METHODS = ("ptq", "qat")
_BUILT = ("model", "data", "trainer")


@dataclass(frozen=True)
class Quantize:
    """One recipe, by one or both methods, on some runtimes."""

    recipe: str | dict[str, Any]
    """Name of a recipe, path of a YAML or JSON file, or the recipe itself, also as torchchat's JSON."""
    rules: list[dict[str, Any]] = field(default_factory=list)
    """Rules in front of the recipe's own, as ``qaware check`` proposes them."""
    rounding: Any = None
    """PTQ: how integers are chosen, e.g. ``gptq``, in place of the recipe's own ``rounding``."""
    learning: str | None = None
    """QAT: ``none``, ``lsq`` or ``range``, in place of the recipe's own ``learning``."""
    methods: list[str] = field(default_factory=lambda: ["ptq"])
    """``ptq``, ``qat`` or both."""
    export: list[str | dict[str, Any]] = field(default_factory=list)
    """Runtimes, e.g. ``[executorch, aoti, tract]``."""
    target: str | None = None
    """Submodule to quantize; null for the whole model."""
    engine: str = "auto"
    """``auto`` (by recipe and runtimes), ``modules``, ``eager`` or ``graph``."""
    start_step: int = 0
    """QAT: optimizer step from which the forward pass rounds."""
    freeze_observers_step: int | None = None
    """QAT: optimizer step from which static activation ranges stay."""
    freeze_batch_norm_step: int | None = None
    """QAT: optimizer step from which batch norms use their running statistics, which no longer move."""
    distillation: float = 0.0
    """QAT: share of the loss, 0 to 1, that is the divergence from the float model instead of the own loss."""
    anneal_steps: int = 0
    """QAT: optimizer steps from ``start_step`` in which the rounding hardens little by little."""
    calibration_batches: int | None = None
    """PTQ of static activations: batches that are observed, an error where there are fewer; null: to 32."""
    parity: str = DEFAULT
    """How close an artifact must be to the converted model: ``default``, as the runtime's own tolerance says,
    or ``exact``, ``close``, ``approximate``, ``very``, ``super`` or ``ultra``; see
    :mod:`qaware.parity_levels`."""

    def load_recipe(self) -> Recipe:
        """The recipe with ``rules`` in front and what else is given in place of its own."""
        recipe = Recipe.load(self.recipe)
        if self.rules:
            recipe = recipe.prepend(*map(Rule.from_dict, self.rules))
        given = {"rounding": self.rounding, "learning": self.learning}
        return dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})

    def ptq(self, metrics: Sequence[str] = ()) -> PostTrainingQuantization:
        """PTQ of this entry; without export when only QAT was asked for, as the loss to recover."""
        return PostTrainingQuantization(
            self.load_recipe(),
            self.target,
            self.export if "ptq" in self.methods else [],
            metrics=metrics,
            on_failure="warn",
            engine=self.engine,
            parity=self.parity,
            calibration_batches=self.calibration_batches,
        )

    def qat(self, metrics: Sequence[str] = ()) -> QuantizationAwareTraining:
        """QAT of this entry."""
        return QuantizationAwareTraining(
            self.load_recipe(),
            self.target,
            self.export,
            metrics=metrics,
            on_failure="warn",
            engine=self.engine,
            parity=self.parity,
            start_step=self.start_step,
            freeze_observers_step=self.freeze_observers_step,
            freeze_batch_norm_step=self.freeze_batch_norm_step,
            distillation=self.distillation,
            anneal_steps=self.anneal_steps,
        )

    def check(self) -> None:
        """Refuse what the callbacks would, which are needed after the float training only.

        Raises:
            QawareError: names the key and its value.
        """
        if wrong := [method for method in self.methods if method not in METHODS]:
            raise QawareError(f"methods: {wrong[0]!r} is not one of {', '.join(METHODS)}")
        if not self.methods:
            raise QawareError(f"methods: is empty; give {', '.join(METHODS)} or both")
        self.ptq()
        if "qat" in self.methods:
            self.qat()


@dataclass(frozen=True)
class FineTune:
    """The training that QAT gets, and, so that "recovered" is honest, its float control too."""

    max_steps: int
    lr: float | None = None
    """Learning rate in place of the model's own ``lr`` hyperparameter."""

    def check(self) -> None:
        """Refuse what would only be found after the float training, or train for ever.

        Raises:
            QawareError: no step, or a learning rate that is none.
        """
        if self.max_steps < 1:
            raise QawareError(f"finetune.max_steps: {self.max_steps} must be at least 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise QawareError(f"finetune.lr: {self.lr} must be above 0; leave it out for the model's own")


@dataclass(frozen=True)
class Experiment:
    """What an experiment file holds."""

    name: str
    model: dict[str, Any]
    """``{class_path: <LightningModule>, init_args: {...}}``."""
    data: dict[str, Any]
    """``{class_path: <LightningDataModule>, init_args: {...}}``."""
    quantize: list[Quantize]
    trainer: dict[str, Any] | None = None
    """Arguments of ``lightning.pytorch.Trainer`` for the float training; null to take the model as it is."""
    finetune: FineTune | None = None
    """Needed when a method is qat."""
    seed: int = 0
    output: str = "runs"
    """Folder of run folders."""
    metrics: list[str] = field(default_factory=list)
    """Further ``evaluate`` metrics, by name or path."""
    on_failure: str = "raise"
    """``raise`` when an artifact fails parity or its runtime dies, or ``warn``."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise QawareError(f"seed: {self.seed} must be 0 to {2**32 - 1}")
        if self.on_failure not in ("raise", "warn"):
            raise QawareError(f"on_failure: {self.on_failure!r} is not one of raise, warn")
        for i, entry in enumerate(self.quantize):
            try:
                entry.check()
            except QawareError as error:
                raise QawareError(f"quantize[{i}]: {error}") from error
        if self.finetune is not None:
            self.finetune.check()
        if not self.quantize:
            raise QawareError("quantize: is empty; give at least one {recipe: ...}")
        if self.uses_qat and self.finetune is None:
            raise QawareError(
                "finetune: is missing; qat needs {max_steps: ...}, for itself and for its float control"
            )

    @property
    def uses_qat(self) -> bool:
        """Whether any entry trains."""
        return any("qat" in entry.methods for entry in self.quantize)


def read_experiment(config: Config) -> Experiment:
    """Check ``config`` against :class:`Experiment`; unknown keys and wrong types are errors."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Experiment, None)
    # Left out, as jsonargparse would make objects of the classes that are named in them, of whatever kind;
    # that is for ``build``.
    plain = {key: value for key in _BUILT if isinstance(value := config.get(key), Mapping)}
    parsed = parse(parser, "experiment", {**config, **{key: {} for key in plain}})
    return Experiment(**{**parsed, **plain})


def build_model(experiment: Experiment) -> pl.LightningModule:
    """The model, seeded."""
    pl.seed_everything(experiment.seed, workers=True, verbose=False)
    return build("model", experiment.model, pl.LightningModule)


def check_plans(experiment: Experiment, model: pl.LightningModule) -> list[Plan]:
    """Match every recipe, and refuse what a runtime cannot hold, before any training.

    Raises:
        QawareError: names each layer, the value and the nearest legal choice.
    """
    load_extra(experiment.metrics)
    plans = []
    for entry in experiment.quantize:
        plan = entry.load_recipe().match(find_target(model, entry.target))
        require_legal(plan, get_exporters(entry.export))
        plans.append(plan)
    return plans
