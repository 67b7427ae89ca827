"""SmoothQuant: outliers of activations move into the weights that multiply them.

Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models" (ICML
2023, arXiv:2211.10438), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qaware.plan import Plan
from qaware.rounding.folding import NOT_SCALED, Fold, SameOutputs, apply_scales, per_channel, usable
from qaware.rounding.folding_probe import channels_last
from qaware.rounding.folding_search import find_folds
from qaware.rounding.folding_trace import require_finite
from qaware.rounding.recording import Recording
from qaware.rounding.replaying import replay
from qaware.roundings import SmoothQuant


@torch.no_grad()
def fold(model: nn.Module, plan: Plan, recording: Recording, step: SmoothQuant) -> dict[str, str]:
    """Scale the inputs of the layers that round them to int8; see :class:`qaware.rounding.base.Folder`."""
    wanted = [n for n, d in plan.quantized.items() if d.scheme is not None and d.scheme.activation != "none"]
    before = SameOutputs(model, recording)
    folds, reasons = find_folds(model, recording, wanted)
    notes = {name: f"smoothquant: {NOT_SCALED}, {why}" for name, why in reasons.items()}
    names = [name for found in folds for name in found.consumers if name in wanted]
    largest = _largest_inputs(model, recording, names)
    for found in folds:
        scored = [name for name in found.consumers if name in wanted]
        scales = _scales(model, found, {name: largest[name] for name in scored}, step.alpha)
        apply_scales(model, found, scales)
        ratio = float(scales.max() / scales.min())
        notes.update(dict.fromkeys(scored, f"smoothquant: {ratio:.3g} times, in {found.producer}"))
    if folds:
        before.require(model, "smoothquant")
    return notes


def _largest_inputs(model: nn.Module, recording: Recording, names: Sequence[str]) -> dict[str, Tensor]:
    """The largest absolute value that enters at each channel, float32 (width,), on all ranks."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    largest = {n: torch.zeros(m.weight.shape[1], device=m.weight.device) for n, m in layers.items()}

    def look(name: str, x: Tensor) -> None:
        require_finite(name, x)
        values = channels_last(layers[name], x).abs().amax(0)
        largest[name] = torch.maximum(largest[name], values)

    replay(model, recording, names, look)
    if dist.is_available() and dist.is_initialized():
        for name in names:
            dist.all_reduce(largest[name], dist.ReduceOp.MAX)
    return largest


def _scales(model: nn.Module, found: Fold, largest: dict[str, Tensor], alpha: float) -> Tensor:
    """Equation 4: the input's range to the power of ``alpha`` over the weights' to the power of the rest."""
    inputs = torch.stack([per_channel(found, x, "amax") for x in largest.values()]).amax(0)
    weights = torch.stack([_largest_weight(model, found, name) for name in largest]).amax(0)
    return usable(inputs**alpha / weights ** (1 - alpha))


def _largest_weight(model: nn.Module, found: Fold, name: str) -> Tensor:
    weight: Any = model.get_submodule(name).weight
    return per_channel(found, weight.detach().float().abs().transpose(0, 1).flatten(1).amax(1), "amax")
