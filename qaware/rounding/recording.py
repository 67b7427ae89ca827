"""What enters a model for the calibration batches, kept so that it can be run again and again.

A rounding method looks at one layer after the other, each time with all that is rounded before it. The
batches pass through the user's own step once; what that calls is kept, and called again from then on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qaware.buffers import own_buffers
from qaware.calibration import Look, same_draws
from qaware.calibration_checks import Watch
from qaware.engines.example import Example
from qaware.errors import QawareError


@dataclass(frozen=True)
class Call:
    """One call of a module from outside the model."""

    module: str
    """Its name in the model; empty for the model itself."""
    example: Example
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Those of the model that earlier calls had changed, by name, e.g. a cache."""

    def run(self, model: nn.Module) -> Any:
        """What the call gives, with the same random numbers each time; neither ``model`` nor the recording
        is changed."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with _uncompiled(), same_draws(), own_buffers(model, self.buffers):
            return self.example.copy().to(device).run(model.get_submodule(self.module))


Recording = list[Call]
"""All calls, in order. Tensors are on the CPU."""


class Recorder(Look):
    """Keeps the outermost calls of modules of a model while it is entered: of the model itself, or, where a
    step goes past its ``forward``, of its parts. Calls are kept for the batches of this rank's share only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([], 0, Watch({}))
        self.model = model
        self.calls: Recording = []
        self.on = True
        self._depth = 0
        self._before = {name: buffer.cpu().clone() for name, buffer in model.named_buffers()}
        self._hooks: list[RemovableHandle] = []

    def __call__(self, on: bool) -> None:
        """Switch, for batches that do not count."""
        self.on = on

    def __enter__(self) -> Recorder:
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.on and not self._depth:
                self.calls.append(Call(name, Example(args, kwargs).copy(), self._changed()))
            self._depth += 1

        return look

    def _changed(self) -> dict[str, Tensor]:
        now = {name: buffer.detach().cpu() for name, buffer in self.model.named_buffers()}
        return {
            name: buffer.clone()
            for name, buffer in now.items()
            if name not in self._before or not torch.equal(buffer, self._before[name])
        }

    def _leave(self, *_: Any) -> None:
        self._depth -= 1


def record(model: nn.Module, run_pass: Callable[[Look], None]) -> Recording:
    """What enters a float ``model`` for the calibration batches, from the same random state as calibration.

    Args:
        model: in evaluation mode.
        run_pass: runs the calibration batches through the model once.

    Raises:
        QawareError: the batches did not call the model.
    """
    with torch.no_grad(), _uncompiled(), same_draws(), own_buffers(model), Recorder(model) as recorder:
        run_pass(recorder)
    if not _anywhere(bool(recorder.calls)):
        raise QawareError("calibration: no batch called the model; give batches on which it runs")
    return recorder.calls


def _uncompiled() -> AbstractContextManager[None]:
    """Compiled models run as they are written: each hook would be a reason to compile again."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _anywhere(here: bool) -> bool:
    """Whether it is so on any rank; one that has no batch of its own waits for the others."""
    if not (dist.is_available() and dist.is_initialized()):
        return here
    everywhere = [here] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return any(everywhere)
