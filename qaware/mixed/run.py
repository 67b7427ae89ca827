"""``qaware sensitivity`` and ``qaware search``: the layers of an experiment's model, measured one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from qaware.callbacks.data import find_target
from qaware.callbacks.nested import detached_copy
from qaware.callbacks.progress import trainer_progress
from qaware.config import build
from qaware.errors import QawareError
from qaware.experiment import Experiment, Quantize, build_model
from qaware.exporters import get_exporters, runtime_name
from qaware.exporters.base import first_line
from qaware.files import require_writable, write_json
from qaware.mixed.choices import open_choices
from qaware.mixed.found import Found
from qaware.mixed.search import Search, Settings
from qaware.mixed.sensitivity import Sensitivity, measure, require_method
from qaware.mixed.source import head, scored_task, task_for
from qaware.mixed.trial import Source
from qaware.pipeline import Progress
from qaware.plan import Plan
from qaware.report.search import plot_frontier
from qaware.report.sensitivity import STEM, write_sensitivity
from qaware.run import FLOAT, Run
from qaware.tasks import Task


class MeasuredRun(Run):
    """A run of an experiment that measures layers of its float model."""

    def __init__(
        self, experiment: Experiment, recipe: str | None, windows: int, checkpoint: str | None
    ) -> None:
        """
        Args:
            experiment: gives the model, its training, the data and the runtimes.
            recipe: one of the experiment's, by which its rules are taken too, or any other; None: its first.
            windows: validation windows or batches that layers are measured on.
            checkpoint: weights of the float model, in place of its training.
        """
        super().__init__(experiment)
        self.entry = entry_of(experiment, recipe)
        self.windows, self.checkpoint = windows, checkpoint

    def _opened(self) -> tuple[pl.LightningModule, pl.LightningDataModule, Task, Task, Plan]:
        """Model, data, what is scored, the part of it that layers are measured on, and the plan: all that can
        be wrong before the training."""
        model = build_model(self.experiment)
        data = build("data", self.experiment.data, pl.LightningDataModule)
        plan = self.entry.load_recipe().match(find_target(model, self.entry.target))
        with isolate_rng():  # the training draws as if nothing had been looked at
            task = scored_task(task_for(model, data, self.entry.target))
        return model, data, task, head(task, self.windows), plan

    def _train_float(self, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
        if self.checkpoint is None:
            super()._train_float(model, data)
            return
        load_weights(model, Path(self.checkpoint))
        trainer = self._trainer({"limit_val_batches": 1}, FLOAT)
        trainer.validate(model, datamodule=data, verbose=False)
        self._keep_data(data)
        self._score_float(trainer, model, FLOAT)

    def _source(self, data: pl.LightningDataModule) -> Source:
        entry = self.entry
        batches, runtimes = entry.calibration_batches, [runtime_name(named) for named in entry.export]
        return Source(lambda: _calibration(data), batches, None, runtimes, entry.engine)

    def _progress(self) -> Progress:
        return trainer_progress(self._trainer({}, "layers"))

    def _root(self, model: pl.LightningModule) -> Any:
        return find_target(detached_copy(model), self.entry.target)


class SensitivityRun(MeasuredRun):
    """What each layer of a recipe costs."""

    result: Sensitivity

    def __init__(
        self,
        experiment: Experiment,
        recipe: str | None = None,
        method: str = "exact",
        windows: int = 32,
        out: str | None = None,
        checkpoint: str | None = None,
    ) -> None:
        """As :class:`MeasuredRun`; ``method`` is ``exact``, ``estimate`` or ``both``, and ``out`` the folder
        of table and plot, by default the run's."""
        require_method(method)
        super().__init__(experiment, recipe, windows, checkpoint)
        self.method, self.out = method, Path(out) if out else self.folder
        require_writable(self.out / f"{STEM}.md")

    def _stages(self) -> None:
        model, data, _, part, plan = self._opened()
        plan.require_possible()
        self._train_float(model, data)
        root = self._root(model)
        self.result = measure(root, plan, part, self.method, self._source(data), self._progress())
        write_sensitivity(self.result, self.out, self.experiment.name)


class SearchRun(MeasuredRun):
    """A scheme for each layer within a budget, then the experiment with it."""

    found: Found

    def __init__(
        self,
        experiment: Experiment,
        settings: Settings,
        base: str | None = None,
        windows: int = 32,
        out: str | None = None,
        checkpoint: str | None = None,
        train: bool = False,
    ) -> None:
        """As :class:`MeasuredRun`; ``settings`` without runtimes and source, which the experiment has;
        ``out`` is where the recipe goes, by default ``recipe.yaml`` in the run's folder; ``train`` makes the
        experiment train it, by its ``finetune``, instead of PTQ.

        Raises:
            QawareError: the experiment names no runtime, one of them is not installed, there is no
                ``finetune`` to train by, or ``out`` cannot be written.
        """
        entry = entry_of(experiment, base)
        method = "qat" if train else "ptq"
        self.after = dataclasses.replace(
            experiment, quantize=[dataclasses.replace(entry, methods=[method], rules=[])]
        )
        exporters = get_exporters(entry.export)
        _require_runtimes(entry, [m for e in exporters if (m := e.missing())])
        super().__init__(experiment, base, windows, checkpoint)
        self.settings = dataclasses.replace(
            settings,
            exporters=exporters,
            seed=experiment.seed,
            name=f"{entry.load_recipe().name.rstrip('+')}-{settings.budget.slug}",
        )
        self.path = Path(out) if out else self.folder / "recipe.yaml"
        if self.path.suffix not in (".yaml", ".yml"):
            raise QawareError(f"out: {self.path} is read as a recipe's file later; let it end in .yaml")
        require_writable(self.path)

    def _stages(self) -> None:
        model, data, task, part, plan = self._opened()
        settings = self.settings
        open_choices(plan, settings.budget, settings.widths, settings.exporters)
        self._train_float(model, data)
        settings = dataclasses.replace(settings, source=self._source(data), progress=self._progress())
        self.found = Search(self._root(model), plan, task, part, settings).run()
        self.found.save(self.path)
        write_json(self.folder / "search.json", self.found.to_dict())
        plot_frontier(
            self.found, self.folder / "search.png", f"{self.experiment.name}: {settings.budget.text}"
        )
        entry = dataclasses.replace(self.after.quantize[0], recipe=str(self.path))
        self.experiment = dataclasses.replace(self.after, quantize=[entry])
        self._quantize_all(model, data)


def entry_of(experiment: Experiment, recipe: str | None) -> Quantize:
    """The experiment's entry of a recipe, with its rules; for another one its first entry with that."""
    for entry in experiment.quantize:
        if recipe is None or entry.recipe == recipe:
            return entry
    return dataclasses.replace(experiment.quantize[0], recipe=recipe or "", rules=[])


def load_weights(model: pl.LightningModule, path: Path) -> None:
    """Give ``model`` the weights of a Lightning checkpoint, or of a file that is a state dict.

    Raises:
        QawareError: unreadable, or of another model.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(loaded.get("state_dict", loaded))
    except OSError as error:
        raise QawareError(f"checkpoint: {path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # each kind of damage raises its own
        raise QawareError(f"checkpoint: {path} does not fit the model ({first_line(error)})") from error


def _calibration(data: Any) -> Any:
    """Training data, as PTQ calibrates on."""
    data.setup("fit")
    loader = getattr(data, "calibration_dataloader", data.train_dataloader)
    return loader()


def _require_runtimes(entry: Quantize, missing: Sequence[str]) -> None:
    if not entry.export:
        raise QawareError(
            f"export: the entry of recipe {entry.recipe!r} names no runtime, and schemes are chosen so that "
            "its runtimes hold them; add export: [executorch, aoti, tract], or some of them"
        )
    if missing:
        raise QawareError("; ".join(missing))
