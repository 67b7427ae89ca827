"""Run recorded calls again and look at what enters the layers of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qaware.rounding.recording import Recording

Inputs = Callable[[str, Tensor], None]
"""Takes a layer's name and what enters it."""


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


class Enough(Exception):
    """Ends a call when all that is looked at was seen."""

    def forget(self) -> None:
        """Let go of what was computed on the way: frames that hold the exception, which holds them, would
        keep it until the next collection of garbage."""
        self.__traceback__ = None


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
            raise Enough

    handles = [
        model.get_submodule(name).register_forward_pre_hook(_looking(name, hook), with_kwargs=True)
        for name in names
    ]
    try:
        for call in recording:
            waiting.update(names)
            try:
                call.run(model)
            except Enough as enough:
                enough.forget()
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
