"""Run the steps of a recipe's rounding over a model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.weight_fake_quant import Float16FakeQuantizer
from qaware.plan import Plan
from qaware.rounding.beside import Beside
from qaware.rounding.kinds import FOLDERS
from qaware.rounding.one_layer import round_layer
from qaware.rounding.recording import Recording
from qaware.rounding.replaying import Group, replay
from qaware.rounding.report import RoundedLayer, RoundingReport
from qaware.rounding.ties import find_ties
from qaware.rounding.walk import Seen, Walk


def fold_scales(model: nn.Module, plan: Plan, recording: Recording) -> dict[str, str]:
    """Run the steps that fold scales into other layers, on the float ``model`` in place.

    Returns:
        What was done to each layer, by name.
    """
    notes: dict[str, str] = {}
    for step in plan.recipe.steps:
        if step.stage == 0:
            for name, note in FOLDERS[step.name](model, plan, recording, step).items():
                notes[name] = f"{notes[name]}; {note}" if name in notes else note
    return notes


@torch.no_grad()
def round_weights(
    model: nn.Module,
    plan: Plan,
    recording: Recording | None,
    parted: dict[str, str] | None = None,
    notes: dict[str, str] | None = None,
    advance: Callable[[], None] = lambda: None,
    twin: nn.Module | None = None,
) -> RoundingReport:
    """Choose the integers of every quantized layer of a prepared ``model``, in place.

    With data the layers are taken in the order in which they run, each with what the layers before it,
    already rounded, let through; only the sums of the layers that take the same tensor are held at a time.

    Args:
        model: prepared and calibrated, in evaluation mode.
        plan: that of ``model``.
        recording: of the calibration batches; None where no step needs data.
        parted: the layers whose ties were cut, with the name of the one that they shared with.
        notes: of the steps that folded scales, by layer.
        advance: is called after each layer.
        twin: a copy of ``model`` that computes in float, where there is one already.
    """
    set_fake_quant(model, True)
    ties = find_ties(model, plan)
    beside = Beside(model, twin) if recording is not None and _looks_beside(plan) else None
    layers: list[RoundedLayer] = []
    for names, seen in _turns(model, plan, recording, ties, beside):
        for name in names:
            others = [model.get_submodule(other) for other in ties.get(name, ())]
            line = round_layer(name, model.get_submodule(name), others, plan.recipe, seen.get(name))
            layers += _lines(line, ties.get(name, ()), parted or {}, notes or {})
            advance()
    return RoundingReport(tuple(layers))


def _looks_beside(plan: Plan) -> bool:
    """Whether a step compares with the float model."""
    return any(step.stage == 2 or getattr(step, "correct", False) for step in plan.recipe.steps)


def _turns(
    model: nn.Module,
    plan: Plan,
    recording: Recording | None,
    ties: dict[str, tuple[str, ...]],
    beside: Beside | None,
) -> Iterator[tuple[Sequence[str], Seen]]:
    """The layers that are rounded together, in order, with the moments of what enters them."""
    followers = {other for others in ties.values() for other in others}
    names = [n for n in plan.quantized if n not in followers and not _is_float16(model, n)]
    if recording is None or not any(step.needs_data for step in plan.recipe.steps if step.stage):
        yield names, {}
        return
    early = [n for n in names if plan.quantized[n].type == "Embedding" and n not in ties]
    tied = [n for n in names if n in ties]
    if beside is not None:
        _keep(beside, model, recording, early, tied)
    if early:
        yield early, {}
    # A head that shares its weight with an embedding is rounded before anything runs on that.
    if tied:
        set_fake_quant(model, False)
        seen = Walk(model, recording, None).observe(Group(tuple(tied), False))
        set_fake_quant(model, True)
        yield tied, seen
    unseen = [n for n in names if n not in early and n not in ties]
    for group, seen in Walk(model, recording, beside).groups(unseen):
        yield group.names, seen
        unseen = [n for n in unseen if n not in group.names]
    if unseen:
        yield unseen, {}


def _keep(
    beside: Beside, model: nn.Module, recording: Recording, early: Sequence[str], tied: Sequence[str]
) -> None:
    """What is rounded before anything runs. Of a table as large as several blocks only the rows that the
    recording looks up; one that is tied to a head is needed whole."""
    if beside.twin is None and early:
        used: dict[str, list[Tensor]] = {name: [] for name in early}
        replay(model, recording, early, lambda name, ids: used[name].append(ids.unique()))
        for name, found in used.items():
            if found:  # one that never runs is not looked at
                beside.keep(name, torch.cat(found).unique().long())
    for name in tied if beside.twin is None else (*early, *tied):
        beside.keep(name)


def _is_float16(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name).weight_fake_quantizer, Float16FakeQuantizer)


def _lines(
    line: RoundedLayer, others: Sequence[str], parted: dict[str, str], notes: dict[str, str]
) -> list[RoundedLayer]:
    """``line`` and the same of the layers tied to it, with what is known of each by name."""
    lines = []
    for name in (line.name, *others):
        tie = f"untied from {parted[name]}, which has another scheme" if name in parted else ""
        if others:
            with_whom = others[0] if name == line.name else line.name
            tie = f"tied to {with_whom}: one set of integers"
        note = "; ".join(text for text in (notes.get(name, ""), line.note) if text)
        lines.append(RoundedLayer(name, line.method, line.error, line.rtn_error, tie, note))
    return lines
