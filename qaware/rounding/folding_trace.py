"""One call of a model as the search for places where scales fit sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qaware.errors import QawareError
from qaware.rounding.recording import Call

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass
class Trace:
    """Which modules ran in one call, and what entered and left those that may take a scale."""

    call: Call
    entered: dict[str, Tensor] = field(default_factory=dict)
    """By layer, in order; kept alive, so that no address is used twice."""
    left: dict[str, Tensor] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)

    def groups(self) -> list[list[str]]:
        """Layers that take the same tensor, in order."""
        found: dict[tuple[int, int], list[str]] = {}
        for name, x in self.entered.items():
            found.setdefault((x.data_ptr(), x.numel()), []).append(name)
        return list(found.values())


@torch.no_grad()
def trace_call(model: nn.Module, call: Call) -> Trace:
    """Run ``call`` and look.

    Raises:
        QawareError: NaN or infinity enters a layer.
    """
    trace = Trace(call)

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        trace.runs[name] += 1
        x = args[0] if args else kwargs.get("input")
        if is_layer(module) and isinstance(x, Tensor):
            require_finite(name, x)
            trace.entered.setdefault(name, x)
        if isinstance(output, Tensor) and makes_channels(module):
            trace.left.setdefault(name, output)

    hooks = [
        module.register_forward_hook(lambda *a, name=name: look(name, *a), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        call.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def is_layer(module: Any) -> bool:
    """Whether it multiplies channels with a weight of its own, all with all."""
    return isinstance(module, _LAYERS) and getattr(module, "groups", 1) == 1 and _has_weight(module)


def makes_channels(module: Any) -> bool:
    """Whether it has a row of weights, or one, for each channel that it gives."""
    return is_norm(module) or (isinstance(module, _LAYERS) and _has_weight(module))


def is_norm(module: Any) -> bool:
    """Whether it may be one that multiplies each channel with a weight, by the shape of that."""
    return not isinstance(module, _LAYERS) and _has_weight(module) and module.weight.dim() == 1


def require_finite(name: str, x: Tensor) -> None:
    """Refuse what else would pass for a layer that takes no scale.

    Raises:
        QawareError: ``x``, which enters layer ``name``, has NaN or infinity.
    """
    if not bool(x.isfinite().all()):
        raise QawareError(
            f"{name}: calibration gave NaN or infinity as its input; look for broken samples in the data"
        )


def _has_weight(module: Any) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def smallest_around(trace: Trace, names: Sequence[str]) -> str:
    """The smallest module that runs once and has all of these inside."""
    around = trace.call.module
    steps = names[0].split(".")
    for length in range(1, len(steps)):
        path = ".".join(steps[:length])
        if all(inside(name, path) for name in names) and trace.runs[path] == 1 and inside(path, around):
            around = path
    return around


def inside(name: str, module: str) -> bool:
    """Whether module ``name`` is ``module``, which may be the whole model, or in it."""
    return not module or name == module or name.startswith(f"{module}.")
