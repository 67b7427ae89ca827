"""What enters a model for the calibration batches, kept so that it can be run again and again.

A rounding method looks at one layer after the other, each time with all that is rounded before it. The
batches pass through the user's own step once; what that calls is kept, and called again from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from qaware.calibration import Look, same_draws
from qaware.calibration_checks import Watch
from qaware.engines.example import Example
from qaware.errors import QawareError

Inputs = Callable[[str, Tensor], None]
"""Takes a layer's name and what enters it."""


@dataclass(frozen=True)
class Call:
    """One call of a module from outside the model."""

    module: str
    """Its name in the model; empty for the model itself."""
    example: Example


Recording = list[Call]
"""All calls, in order. Tensors are on the CPU."""


class Recorder(Look):
    """Keeps the outermost calls of modules of a model while it is entered: of the model itself, or, where a step
    goes past its ``forward``, of its parts. Calls are kept for the batches of this rank's share only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([], 0, Watch({}))
        self.model = model
        self.calls: Recording = []
        self.on = True
        self._depth = 0
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
                self.calls.append(Call(name, Example(tree_map(_copied, args), tree_map(_copied, kwargs))))
            self._depth += 1

        return look

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
    with torch.no_grad(), same_draws(), Recorder(model) as recorder:
        run_pass(recorder)
    if not recorder.calls:
        raise QawareError("calibration: no batch called the model; give batches on which it runs")
    return recorder.calls


@dataclass(frozen=True)
class Group:
    """Layers that take the very same tensor."""

    names: tuple[str, ...]
    once: bool
    """Whether each of them runs once in a call, so that a call may end after the last."""


class _Enough(Exception):
    """Ends a call when every layer was seen."""


@torch.no_grad()
def replay(
    model: nn.Module, recording: Recording, names: Sequence[str], look: Inputs, once: bool = False
) -> None:
    """Run the recording and show ``look`` what enters some layers, each time that one of them runs.

    Args:
        model: in evaluation mode.
        recording: of this model, or of one with the same modules.
        names: of the layers.
        look: takes the name of a layer and what enters it.
        once: end each call after all of them ran once.
    """
    waiting: set[str] = set()

    def hook(name: str, x: Tensor) -> None:
        look(name, x)
        waiting.discard(name)
        if once and not waiting:
            raise _Enough

    handles = [
        model.get_submodule(name).register_forward_pre_hook(_looking(name, hook), with_kwargs=True)
        for name in names
    ]
    try:
        for call in recording:
            waiting.update(names)
            try:
                call.example.to(_device(model)).run(model.get_submodule(call.module))
            except _Enough:
                continue
    finally:
        for handle in handles:
            handle.remove()


def _looking(name: str, hook: Inputs) -> Callable[..., None]:
    return lambda module, args, kwargs: hook(name, args[0] if args else kwargs["input"])


def groups_in_order(model: nn.Module, recording: Recording, names: Sequence[str]) -> list[Group]:
    """The layers in the order in which they first run. Those that never run are left out."""
    turns: dict[str, int] = {}
    several: set[str] = set()
    for call in recording:
        entered: list[Tensor] = []  # kept alive, so that no address is used twice
        ran: set[str] = set()

        def look(name: str, x: Tensor, entered: list[Tensor] = entered, ran: set[str] = ran) -> None:
            if name in ran:
                several.add(name)
            ran.add(name)
            same = next((i for i, tensor in enumerate(entered) if tensor is x), None)
            entered.append(x)
            turns.setdefault(name, len(entered) - 1 if same is None else same)

        replay(model, [call], names, look)
    order: dict[int, list[str]] = {}
    for name, turn in turns.items():
        order.setdefault(turn, []).append(name)
    return [Group(tuple(order[t]), several.isdisjoint(order[t])) for t in sorted(order)]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
