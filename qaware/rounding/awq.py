"""AWQ: input channels with large activations get finer weights, by scales folded into the layer before.

Lin et al., "AWQ: activation-aware weight quantization for on-device LLM compression and acceleration"
(MLSys 2024, arXiv:2306.00978), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.plan import Plan
from qaware.rounding import mse, rtn
from qaware.rounding.base import Chooser
from qaware.rounding.folding import NOT_SCALED, Fold, SameOutputs, apply_scales, per_channel, usable
from qaware.rounding.folding_search import find_folds
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.rounding.recording import Recording
from qaware.rounding.replaying import replay
from qaware.roundings import Awq, Mse, Step

_CHEAP: dict[str, Chooser] = {"rtn": rtn.choose, "mse": mse.choose}
"""What the scales are tried with; for all others ``mse`` stands in."""
_MEMORY = 1 << 28
"""Bytes of moments that are held at a time; those of one fold may be more."""


@torch.no_grad()
def fold(model: nn.Module, plan: Plan, recording: Recording, step: Awq) -> dict[str, str]:
    """Scale the inputs of the layers with integer weights; see :class:`qaware.rounding.base.Folder`."""
    wanted = [n for n, d in plan.quantized.items() if d.type != "Embedding" and not _scheme(plan, n).is_float]
    before = SameOutputs(model, recording)
    folds, reasons = find_folds(model, recording, wanted)
    notes = {name: f"awq: {NOT_SCALED}, {why}" for name, why in reasons.items()}
    for found, seen in _observe(model, recording, folds, wanted):
        scored = [name for name in found.consumers if name in wanted]
        exponent, scales, gain = _search(model, plan, found, seen, step)
        apply_scales(model, found, scales)
        note = f"awq: exponent {exponent:.2f} in {found.producer}, error {gain:.2f} of unscaled"
        notes.update(dict.fromkeys(scored, note))
    if folds:
        before.require(model, "awq")
    return notes


def _scheme(plan: Plan, name: str) -> Any:
    return plan.quantized[name].scheme


def _observe(
    model: nn.Module, recording: Recording, folds: Sequence[Fold], wanted: Sequence[str]
) -> Iterator[tuple[Fold, dict[str, Moments]]]:
    """Each fold with the moments of what enters its consumers. As many as fit in the memory that is allowed
    see the data in one pass: scales change what enters the consumers of their own fold only."""
    waiting: list[tuple[Fold, dict[str, Moments]]] = []
    for index, found in enumerate(folds):
        waiting.append((found, _moments(model, found, [n for n in found.consumers if n in wanted])))
        held = sum(
            m.hessian.nbytes for _, seen in waiting for m in {id(m): m for m in seen.values()}.values()
        )
        if held < _MEMORY and index < len(folds) - 1:
            continue
        _look(model, recording, {name: m for _, seen in waiting for name, m in seen.items()})
        yield from waiting
        waiting = []


def _moments(model: nn.Module, found: Fold, names: Sequence[str]) -> dict[str, Moments]:
    """Empty ones; linear layers have the same, since they take the same channels."""
    layers = {name: model.get_submodule(name) for name in names}
    first = next(iter(layers.values()))
    if all(isinstance(layer, nn.Linear) for layer in layers.values()):
        return dict.fromkeys(names, Moments(first))
    return {name: Moments(layer) for name, layer in layers.items()}


def _look(model: nn.Module, recording: Recording, seen: dict[str, Moments]) -> None:
    last: dict[int, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        moments = seen[name]
        if last.get(id(moments)) is not x:  # the very tensor counts once, whichever layers take it
            last[id(moments)] = x
            moments.look(x)

    replay(model, recording, list(seen), look)
    for name, moments in {id(m): (n, m) for n, m in seen.items()}.values():
        moments.reduce(name)


def _search(
    model: nn.Module, plan: Plan, found: Fold, seen: dict[str, Moments], step: Awq
) -> tuple[float, Tensor, float]:
    """The exponent whose scales leave the least squared error in the layers' outputs, these scales, and the
    error as a share of that without scales."""
    layers = [_Layer(model.get_submodule(n), plan, n, found, moments) for n, moments in seen.items()]
    sizes = torch.stack([per_channel(found, layer.size, "mean") for layer in layers]).mean(0)
    exponents = [index / (step.candidates - 1) for index in range(step.candidates)]
    tried = [_scales(sizes, exponent) for exponent in exponents]
    errors = [sum(layer.error(scales) for layer in layers) for scales in tried]
    best = min(range(step.candidates), key=lambda index: errors[index])
    return exponents[best], tried[best], errors[best] / errors[0] if errors[0] > 0 else 1.0


def _scales(sizes: Tensor, exponent: float) -> Tensor:
    """The mean absolute input to the power of ``exponent``, around 1."""
    scales = usable(sizes**exponent)
    return usable(scales / (scales.max() * scales.min()).sqrt())


class _Layer:
    """One layer as it is rounded with its input scaled."""

    def __init__(self, layer: Any, plan: Plan, name: str, found: Fold, moments: Moments) -> None:
        scheme = _scheme(plan, name)
        chooser: Step = next(step for step in plan.recipe.steps if step.stage == 1)
        self.choose = _CHEAP.get(chooser.name, mse.choose)
        self.step = chooser if chooser.name in _CHEAP else Mse()
        self.grid = Grid(WeightFakeQuantizer(scheme, narrow=scheme.is_static).to(layer.weight.device))
        self.weight = layer.weight.float().flatten(1)
        self.moments = moments
        self.channels = found.channels.to(layer.weight.device)
        self.kernel = self.weight.shape[1] // len(self.channels)
        hessian = moments.hessian[0]
        self.size = hessian.diagonal().sqrt().view(-1, self.kernel).mean(1)

    def error(self, scales: Tensor) -> float:
        """Squared error of the output, of one sample."""
        factor = scales.to(self.weight.device)[self.channels].repeat_interleave(self.kernel)
        chosen = self.choose(self.weight * factor, self.grid, self.step, None)
        change = chosen.weight / factor - self.weight
        return float(((change @ self.moments.hessian[0]) * change).sum())
