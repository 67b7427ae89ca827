"""``qaware.sensitivity`` and ``qaware.search``: for a LightningModule and its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from qaware.api import Step
from qaware.callbacks.data import find_target
from qaware.callbacks.nested import detached_copy
from qaware.exporters import get_exporter
from qaware.mixed.budget import Budget
from qaware.mixed.candidates import WIDTHS
from qaware.mixed.found import Found
from qaware.mixed.search import Search, Settings
from qaware.mixed.sensitivity import Sensitivity, measure, require_method
from qaware.mixed.source import head, scored_task, task_for
from qaware.mixed.trial import Source
from qaware.recipe import Recipe


def sensitivity(
    model: pl.LightningModule,
    recipe: str | dict[str, Any] | Recipe,
    data: Any,
    *,
    method: str = "exact",
    windows: int = 32,
    target: str | None = None,
    runtimes: Sequence[str] = (),
    engine: str = "auto",
    calibration: Any = None,
    calibration_batches: int | None = None,
    step: Step | None = None,
) -> Sensitivity:
    """What quantizing each layer alone costs, in nats; tied layers are one. ``model`` is not changed.

    Args:
        model: float.
        recipe: name, path of a YAML file, plain data, or a :class:`qaware.Recipe`.
        data: a LightningDataModule or a validation loader; what is scored, perplexity or the loss of labelled
            classes, is found from it as the callbacks do.
        method: ``exact``, each layer quantized alone and scored, with a paired interval; ``estimate``, half
            the sum of squared gradients times squared rounding errors, without a forward pass for each
            layer; or ``both``, with their rank correlation.
        windows: validation windows or batches that are used, from the first on; 2 or more.
        target: name of the submodule to quantize.
        runtimes: by which the engine is chosen.
        engine: ``auto``, ``modules``, ``eager`` or ``graph``.
        calibration, calibration_batches, step: as of :func:`qaware.quantize`.

    Raises:
        QawareError: unknown method, a recipe that fits nothing, or no validation data that can be scored.
    """
    require_method(method)
    root = find_target(detached_copy(model), target)
    plan = Recipe.load(recipe).match(root)
    plan.require_possible()
    part = head(scored_task(task_for(model, data, target)), windows)
    source = Source(calibration, calibration_batches, step, runtimes, engine)
    return measure(root, plan, part, method, source)


def search(
    model: pl.LightningModule,
    base: str | dict[str, Any] | Recipe,
    data: Any,
    budget: str,
    *,
    bits: Sequence[int] = WIDTHS,
    runtimes: Sequence[str] = (),
    method: str = "exact",
    windows: int = 32,
    name: str = "mixed",
    target: str | None = None,
    engine: str = "auto",
    calibration: Any = None,
    calibration_batches: int | None = None,
    step: Step | None = None,
) -> Found:
    """A scheme for each layer: the least divergence from the float model within a budget. ``model`` is not
    changed.

    Args:
        model: float.
        base: the recipe whose schemes get other widths; its rounding and all else stays.
        data: a LightningDataModule or a validation loader.
        budget: ``4.5bpw`` (bits for each quantized weight, with scales and zero points), ``bytes=120000`` (of
            the whole model, packed) or ``d_nats=0.05`` (measured).
        bits: widths to choose from, 1 to 8.
        runtimes: each scheme is one that all of these hold.
        method: what a layer costs at a width: ``exact``, measured, or ``estimate``, from gradients.
        windows: validation windows or batches, from the first on, that the choice is made on; what is found
            is measured on all of them.
        name: of the recipe.
        target: name of the submodule to quantize.
        engine: ``auto``, ``modules``, ``eager`` or ``graph``.
        calibration, calibration_batches, step: as of :func:`qaware.quantize`.

    Returns:
        The recipe, with the frontier that it is on.

    Raises:
        QawareError: a budget of another form or out of reach, a base that fits nothing, widths that no
            runtime holds, or no validation data that can be scored.
    """
    source = Source(calibration, calibration_batches, step, runtimes, engine)
    exporters = [get_exporter(runtime) for runtime in runtimes]
    settings = Settings(Budget.parse(budget), bits, exporters, method, name, source=source)
    root = find_target(detached_copy(model), target)
    plan = Recipe.load(base).match(root)
    task = scored_task(task_for(model, data, target))
    return Search(root, plan, task, head(task, windows), settings).run()
