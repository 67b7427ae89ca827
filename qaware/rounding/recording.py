"""What enters a model for the calibration batches, kept so that it can be run again and again.

A rounding method looks at one layer after the other, each time with all that is rounded before it. The
batches pass through the user's own step once; what that calls is kept, and called again from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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
    """Keeps the outermost calls of modules of a model while it is entered: of the model itself, or, where a
    step goes past its ``forward``, of its parts. Calls are kept for the batches of this rank's share only."""

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
    if not _anywhere(bool(recorder.calls)):
        raise QawareError("calibration: no batch called the model; give batches on which it runs")
    return recorder.calls


def _anywhere(here: bool) -> bool:
    """Whether it is so on any rank; one that has no batch of its own waits for the others."""
    if not (dist.is_available() and dist.is_initialized()):
        return here
    everywhere = [here] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return any(everywhere)


@dataclass(frozen=True)
class Group:
    """Layers that take the very same tensor."""

    names: tuple[str, ...]
    once: bool
    """Whether each of them runs once in a call, so that a call may end after the last."""


class Run(NamedTuple):
    """One run of a layer: in which call of which rank, and when in it."""

    rank: int
    call: int
    turn: int


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
                _fresh(call.example, _device(model)).run(model.get_submodule(call.module))
            except _Enough:
                continue
    finally:
        for handle in handles:
            handle.remove()


def _looking(name: str, hook: Inputs) -> Callable[..., None]:
    return lambda module, args, kwargs: hook(name, args[0] if args else kwargs["input"])


def groups_in_order(model: nn.Module, recording: Recording, names: Sequence[str]) -> list[Group]:
    """The layers in the order in which they first run, those that always take the same tensor together.
    Those that never run, on any rank, are left out."""
    runs = _runs_of_all_ranks(_runs(model, recording, names))
    together: dict[tuple[Run, ...], list[str]] = {}
    for name in names:
        if name in runs:
            together.setdefault(tuple(runs[name]), []).append(name)
    order = sorted(together, key=lambda seen: min((run.turn, run.call, run.rank) for run in seen))
    return [Group(tuple(together[seen]), _once(seen)) for seen in order]


def _runs(model: nn.Module, recording: Recording, names: Sequence[str]) -> dict[str, list[Run]]:
    """When each layer runs. Layers that take the very same tensor have the same turn."""
    found: dict[str, list[Run]] = {}
    for index, call in enumerate(recording):
        entered: list[weakref.ref[Tensor]] = []  # one that is gone is none, even if its address is used again

        def look(name: str, x: Tensor, index: int = index, entered: list[Any] = entered) -> None:
            turn = next((i for i, seen in enumerate(entered) if seen() is x), len(entered))
            if turn == len(entered):
                entered.append(weakref.ref(x))
            found.setdefault(name, []).append(Run(_rank(), index, turn))

        replay(model, [call], names, look)
    return found


def _runs_of_all_ranks(runs: dict[str, list[Run]]) -> dict[str, list[Run]]:
    if not (dist.is_available() and dist.is_initialized()):
        return runs
    every: list[dict[str, list[Run]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, runs)
    names = dict.fromkeys(name for ranks in every for name in ranks)
    return {name: [run for ranks in every for run in ranks.get(name, ())] for name in names}


def _once(seen: Sequence[Run]) -> bool:
    return len({(run.rank, run.call) for run in seen}) == len(seen)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _fresh(example: Example, device: torch.device) -> Example:
    """A copy that a model may change in place."""
    copied = Example(tree_map(_copied, example.args), tree_map(_copied, example.kwargs))
    return copied.to(device)


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
