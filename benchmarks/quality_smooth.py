"""Static int8 with outliers in the activations, before and after SmoothQuant."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.case import FLOAT, Case
from benchmarks.rows import Row
from qaware.callbacks.nested import detached_copy
from qaware.engines.example import Example
from qaware.lm import CausalLM
from qaware.rounding.folding import apply_scales
from qaware.rounding.folding_search import find_folds
from qaware.rounding.recording import Call

FACTOR, CHANNELS = 50.0, 2
PLANTED = "float, outliers planted"
STATIC = {"bits": 8, "activation": "int8-static", "per_tensor": True}
MOST = 0.02


def smoothing(case: Case) -> list[Row]:
    """Weights and activations in int8 with one range for each tensor, on a model with planted outliers."""
    case.add_float(PLANTED, planted(case))
    for rounding in ("rtn", "smoothquant"):
        rules = [{"role": "embedding", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": STATIC}]
        case.ptq(f"W8A8 {rounding}", {"name": "w8a8", "rounding": rounding, "rules": rules}, PLANTED)
    scores = [case.score(FLOAT, "float"), case.score("W8A8 rtn"), case.score("W8A8 smoothquant")]
    before, collapsed, smooth = (float(score.perplexity or 0.0) for score in scores)
    rise = smooth / before - 1
    return [
        Row(
            row="static per-tensor W8A8 with planted activation outliers, before and after SmoothQuant",
            published="14.8 to 40.3 perplexity; SmoothQuant +6.1% to +1.4%",
            target="collapse shown, recovered to within 2%",
            value=f"{before:.3f} to {collapsed:.2f} perplexity, SmoothQuant {smooth:.3f} ({rise:+.2%})",
            met=collapsed > 2 * before and rise <= MOST,
            case=f"{case.name}, {CHANNELS} channels of each norm's output {FACTOR:g} times as large, the "
            "weights behind as much smaller: the same function in float",
            missed_by="" if rise <= MOST else f"{rise - MOST:.2%}",
            details=[
                case.detail(PLANTED, "float"),
                *(case.detail(f"W8A8 {r}", base=PLANTED) for r in ("rtn", "smoothquant")),
            ],
        )
    ]


def planted(case: Case) -> CausalLM:
    """A copy of the float model that computes the same, with a few large channels behind each norm."""
    model: Any = detached_copy(case.models[FLOAT])
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    folds, _ = find_folds(model, [Call("", Example(case.task.example))], linears)
    for index, fold in enumerate(folds):
        if isinstance(model.get_submodule(fold.producer), nn.Linear):
            continue
        scales = torch.ones(fold.size)
        chosen = torch.randperm(fold.size, generator=torch.Generator().manual_seed(index))[:CHANNELS]
        scales[chosen] = 1 / FACTOR
        apply_scales(model, fold, scales)
    copied: CausalLM = model
    return copied
