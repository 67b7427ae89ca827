"""Rounding on its way from a float model to integers: before the engine prepares it, and after."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qaware.adapters import from_peft
from qaware.errors import QawareError
from qaware.plan import Plan
from qaware.rounding.apply import fold_scales, round_weights
from qaware.rounding.recording import Recording
from qaware.rounding.report import RoundingReport
from qaware.rounding.ties import part_ties


class Rounder:
    """The rounding of one model; made when it is float, used again once it is prepared.

    Example::

        rounder = Rounder(model, plan, lambda: record(model, run_pass))
        engine.prepare(model, rounder.plan)
        calibrate(model, run_pass)
        report = rounder.round(model)
    """

    def __init__(self, model: nn.Module, plan: Plan, recorded: Callable[[], Recording]) -> None:
        """Part ties and fold scales, in ``model`` in place; what the model computes stays as it is.

        Args:
            model: float, in evaluation mode.
            plan: made for it.
            recorded: gives the recording of the calibration batches; called only where a step needs it.

        Raises:
            QawareError: the model has adapters.
        """
        if any(from_peft(module) for module in model.modules()):
            raise QawareError(
                f"rounding: {plan.recipe.rounding!r} chooses the integers of plain weights, and this model "
                "has adapters; merge them first (merge_and_unload), or use rounding: rtn"
            )
        self.parted = part_ties(model, plan)
        self.plan = plan.recipe.match(model).with_layout(plan.layout) if self.parted else plan
        self.recording = recorded() if plan.recipe.needs_data else None
        with torch.no_grad():
            self.notes = {} if self.recording is None else fold_scales(model, self.plan, self.recording)

    def round(
        self,
        prepared: nn.Module,
        advance: Callable[[], None] = lambda: None,
        twin: nn.Module | None = None,
    ) -> RoundingReport:
        """Choose the integers of every layer of the prepared and calibrated model, in place; ``advance`` is
        called after each, and ``twin`` is a copy of it that computes in float, where there is one already."""
        report = round_weights(prepared, self.plan, self.recording, self.parted, self.notes, advance, twin)
        self.recording = None
        return report
