"""Run the steps of a recipe's rounding over a model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.weight_fake_quant import Float16FakeQuantizer
from qaware.errors import QawareError
from qaware.layers import float_twin
from qaware.plan import Plan
from qaware.rounding import rtn
from qaware.rounding.base import Chosen, shipped_weight, write
from qaware.rounding.bias_correction import correct_bias
from qaware.rounding.grid import Grid
from qaware.rounding.kinds import CHOOSERS, FOLDERS
from qaware.rounding.moments import Moments
from qaware.rounding.recording import Recording
from qaware.rounding.replaying import Group, groups_in_order, replay
from qaware.rounding.report import RoundedLayer, RoundingReport
from qaware.rounding.ties import find_ties
from qaware.roundings import Rtn

Seen = dict[str, Moments]


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
    if recording is None or not _looks_beside(plan):
        twin = None
    elif twin is None:
        twin = float_twin(model)
    layers: list[RoundedLayer] = []
    for names, seen in _turns(model, plan, recording, ties, twin):
        for name in names:
            line = _round_layer(model, plan, name, ties.get(name, ()), seen.get(name))
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
    twin: nn.Module | None,
) -> Iterator[tuple[Sequence[str], Seen]]:
    """The layers that are rounded together, in order, with the moments of what enters them."""
    followers = {other for others in ties.values() for other in others}
    names = [n for n in plan.quantized if n not in followers and not _is_float16(model, n)]
    if recording is None or not any(step.needs_data for step in plan.recipe.steps if step.stage):
        yield names, {}
        return
    early = [n for n in names if plan.quantized[n].type == "Embedding" and n not in ties]
    if early:
        yield early, {}
    # A head that shares its weight with an embedding is rounded before anything runs on that.
    tied = [n for n in names if n in ties]
    if tied:
        set_fake_quant(model, False)
        seen = _observe(model, recording, Group(tuple(tied), False), None)
        set_fake_quant(model, True)
        yield tied, seen
    late = [n for n in names if n not in early and n not in ties]
    groups = groups_in_order(model, recording, late)
    for group in groups:
        yield group.names, _observe(model, recording, group, twin)
    unseen = [n for n in late if all(n not in group.names for group in groups)]
    if unseen:
        yield unseen, {}


def _observe(model: nn.Module, recording: Recording, group: Group, twin: nn.Module | None) -> Seen:
    """The moments of each layer's input; linear layers that take the same tensor share them."""
    modules = {n: m for n in group.names if not isinstance(m := model.get_submodule(n), nn.Embedding)}
    together = group.once and all(isinstance(m, nn.Linear) for m in modules.values())
    watched = list(modules)[:1] if together else list(modules)
    seen = {name: Moments(modules[name], twin is not None) for name in watched}
    for call in recording:
        exact: dict[str, list[Tensor]] = {name: [] for name in watched}
        if twin is not None:
            replay(twin, [call], watched, _keep_in(exact), group.once)
        replay(model, [call], watched, _look_with(seen, exact), group.once)
    for name, moments in seen.items():
        moments.reduce(name)
    return dict.fromkeys(modules, seen[watched[0]]) if together else seen


def _keep_in(exact: dict[str, list[Tensor]]) -> Callable[[str, Tensor], None]:
    return lambda name, x: exact[name].append(x.clone())  # as the model may go on to change it in place


def _look_with(seen: Seen, exact: dict[str, list[Tensor]]) -> Callable[[str, Tensor], None]:
    return lambda name, x: seen[name].look(x, _same(exact[name], x))


def _same(exact: list[Tensor], x: Tensor) -> Tensor | None:
    """What entered in the same place of the float model; it may have sent other samples there."""
    found = exact.pop(0) if exact else None
    return found if found is not None and found.shape == x.shape else None


def _is_float16(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name).weight_fake_quantizer, Float16FakeQuantizer)


def _round_layer(
    model: nn.Module, plan: Plan, name: str, others: Sequence[str], moments: Moments | None
) -> RoundedLayer:
    """Choose and write the integers of one layer, and of those tied to it."""
    layer: Any = model.get_submodule(name)
    chooser = next(step for step in plan.recipe.steps if step.stage == 1)
    weight, grid = shipped_weight(layer), Grid(layer.weight_fake_quantizer)
    if not bool(weight.isfinite().all()):
        what = name or type(layer).__name__
        raise QawareError(f"{what}: its weight has NaN or infinity; give a model without")
    nearest = rtn.choose(weight, grid, Rtn(), moments)
    chosen = CHOOSERS[chooser.name](weight, grid, chooser, moments if _usable(moments) else None)
    write(layer, chosen)
    for other in others:
        write(model.get_submodule(other), chosen)
    note = chosen.note
    if any(step.stage == 2 for step in plan.recipe.steps):
        said = correct_bias(layer, weight, chosen.weight, moments)
        note = "; ".join(text for text in (note, said) if text)
    method = plan.recipe.rounding_label
    target = weight if chosen.target is None else chosen.target
    error, rtn_error = (_error(target, c, moments) for c in (chosen, nearest))
    return RoundedLayer(name, method, error, rtn_error, note=note)


def _usable(moments: Moments | None) -> bool:
    return moments is not None and moments.seen


def _error(weight: Tensor, chosen: Chosen, moments: Moments | None) -> float:
    """Squared error as a share: of the output where the input is known, else of the weight."""

    def size(x: Tensor) -> float:
        if moments is None or not moments.seen:
            return float(x.square().sum())
        rows = x.view(moments.groups, -1, x.shape[1])
        return float(((rows @ moments.hessian) * rows).sum())

    whole = size(weight)
    return size(chosen.weight - weight) / whole if whole > 0 else 0.0


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
