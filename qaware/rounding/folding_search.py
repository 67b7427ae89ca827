"""Find where scales can be folded, in any model: candidates by the order in which layers run, each tried out.

What is tried is whether a scale on some channels of one layer reaches others unchanged, and whether the model
computes the same once these have taken it back. So a residual stream, an activation function, or code that
reads a tensor on the way rules a candidate out by itself, whatever the model is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from qaware.rounding.folding import Fold
from qaware.rounding.folding_probe import Probe
from qaware.rounding.folding_trace import Trace, inside, is_layer, is_norm, smallest_around, trace_call
from qaware.rounding.recording import Recording

_TRIES = 6
"""Producers that are tried for one group of layers."""


def find_folds(
    model: nn.Module, recording: Recording, wanted: Sequence[str]
) -> tuple[list[Fold], dict[str, str]]:
    """Where scales can be folded.

    Args:
        model: float, in evaluation mode; is run, and is as it was afterwards.
        recording: of the calibration batches; the first call of each kind is used.
        wanted: names of the layers that are to be scaled.

    Returns:
        The folds, no layer in two as a consumer; and for each wanted layer that is in none, why. Of several
        ranks all get what the first one finds, in its own batches.
    """
    found = [_search(model, recording, wanted)]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(found, 0)
    return found[0]


def _search(
    model: nn.Module, recording: Recording, wanted: Sequence[str]
) -> tuple[list[Fold], dict[str, str]]:
    folds: list[Fold] = []
    reasons = {name: _unseen(model.get_submodule(name)) for name in wanted}
    for call in {call.module: call for call in reversed(recording)}.values():
        trace = trace_call(model, call)
        probes = _Probes(model, trace)
        for group in trace.groups():
            done = {name for fold in folds for name in fold.consumers}
            if done.isdisjoint(group) and not reasons.keys().isdisjoint(group):
                found = _find(model, trace, group, probes)
                if isinstance(found, Fold):
                    folds.append(found)
                else:
                    reasons.update({name: found for name in group if name in reasons})
    done = {name for fold in folds for name in fold.consumers}
    return folds, {name: why for name, why in reasons.items() if name not in done}


def _unseen(layer: nn.Module) -> str:
    """Why a layer that no trace shows takes no scale."""
    return "it never ran in calibration" if is_layer(layer) else "it has no plain weight, or one in groups"


class _Probes:
    """The probe that was used last is kept: groups of layers in one module come together."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.last: tuple[str, Probe] | None = None

    def of(self, name: str) -> Probe:
        if self.last is None or self.last[0] != name:
            layers = [n for n in self.trace.entered if inside(n, name) and self.trace.runs[n] == 1]
            self.last = name, Probe(self.model, name, self.trace.call, layers)
        return self.last[1]


def _find(model: nn.Module, trace: Trace, group: Sequence[str], probes: _Probes) -> Fold | str:
    """The fold of the nearest producer that passes, or why there is none."""
    tied = _tied(model)
    if any(name in tied for name in group):
        return "its weight is tied to another layer's"
    if any(trace.runs[name] > 1 for name in group):
        return "it runs several times in a call"
    why = "nothing before it takes the scale"
    for producer in _producers(model, trace, group):
        if producer in tied:
            why = f"the weight of {producer} before it is tied to another layer's"
            continue
        fold = _try(model, trace, group, producer, probes)
        if fold is None:
            continue
        if any(name in tied for name in fold.consumers):
            why = f"{producer} feeds a layer with a tied weight too"
        elif _might_run(model, trace, fold):
            why = f"{producer} may feed layers that did not run on the first batch"
        else:
            return fold
    return why


def _try(model: nn.Module, trace: Trace, group: Sequence[str], producer: str, probes: _Probes) -> Fold | None:
    module: Any = model.get_submodule(producer)
    probe = probes.of(smallest_around(trace, [producer, *group]))
    width = int(model.get_submodule(group[0]).weight.shape[1])  # type: ignore[union-attr, index]
    for first, size in _slices(len(module.weight), width, is_norm(module)):
        for shift in (0.0, 1.0) if is_norm(module) else (0.0,):
            fold = probe.reached(producer, first, size, shift, group[0])
            if fold is not None and set(group) <= set(fold.consumers):
                return fold
    return None


def _producers(model: nn.Module, trace: Trace, group: Sequence[str]) -> list[str]:
    """What ran before and could make what enters, the likeliest first."""
    x = trace.entered[group[0]]
    width = int(model.get_submodule(group[0]).weight.shape[1])  # type: ignore[union-attr, index]
    names = list(trace.left)
    end = min((names.index(name) for name in group if name in trace.left), default=len(names))
    fitting = []
    for name in reversed(names[:end]):
        module: Any = model.get_submodule(name)
        if trace.runs[name] == 1 and any(True for _ in _slices(len(module.weight), width, is_norm(module))):
            fitting.append(name)
    fitting.sort(key=lambda name: trace.left[name].data_ptr() != x.data_ptr())
    return fitting[:_TRIES]


def _slices(size: int, width: int, norm: bool) -> Iterator[tuple[int, int]]:
    """First channel and number of those of a producer's that may be an input of ``width`` channels."""
    if width % size == 0:
        yield 0, size
    elif size > width and not norm:  # several made at once: values come after queries and keys
        yield from ((size - part, part) for part in (width, width // 2, width // 4, width // 8) if part)
        yield 0, width


def _tied(model: nn.Module) -> set[str]:
    """Layers that share a parameter with others."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _might_run(model: nn.Module, trace: Trace, fold: Fold) -> bool:
    """Whether a layer around that fits did not run, such as an expert that got no token."""
    around = smallest_around(trace, [fold.producer, *fold.consumers])
    return any(
        is_layer(module) and inside(name, around) and not trace.runs[name] and _fits(module, fold)
        for name, module in model.named_modules()
    )


def _fits(module: Any, fold: Fold) -> bool:
    # The class of MultiheadAttention's last layer, whose weight is read and which never runs itself.
    read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return not read and int(module.weight.shape[1]) == len(fold.channels)
