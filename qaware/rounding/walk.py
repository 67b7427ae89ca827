"""The layers of a model in the order in which they run, and what enters each with those before it rounded.

Block by block: what a finished block gave is kept, so that each block runs for its own layers only. A model
whose blocks cannot be run one by one runs from its input for each group of layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from qaware.rounding.beside import Beside
from qaware.rounding.blocks import find_blocks, inside, list_of
from qaware.rounding.moments import Moments
from qaware.rounding.recording import Recording
from qaware.rounding.replaying import Group, groups_in_order, replay
from qaware.rounding.skipping import Given, chains, output_of, skipped

log = logging.getLogger(__name__)

Seen = dict[str, Moments]
"""By layer, of its input."""


class Walk:
    """One way through a prepared model that is rounded meanwhile."""

    def __init__(self, model: nn.Module, recording: Recording, beside: Beside | None) -> None:
        """
        Args:
            model: prepared, in evaluation mode.
            recording: of the calibration batches.
            beside: to look at what enters in the float model too.
        """
        self.model, self.recording, self.beside = model, recording, beside
        self._rounded, self._exact = _Progress(model, recording), _Progress(model, recording)

    def groups(self, names: Sequence[str]) -> Iterator[tuple[Group, Seen]]:
        """Each group of layers with the moments of what enters it; before the next is asked for, its layers
        must be rounded. Layers that never run are left out."""
        blocks = find_blocks(self.model, names)
        with _watching(self.model, blocks) as ran:
            groups = groups_in_order(self.model, self.recording, names)
        order = self._in_order(blocks, ran, groups)
        for index, group in enumerate(groups):
            seen = self.observe(group)
            more = index < len(groups) - 1  # after the last group nothing runs
            ending = [block for block, last in order.items() if more and last == index]
            if self.beside is not None and more:
                self._keep(self.beside, group, ending)
            yield group, seen
            seen.clear()  # those of the next group are as large
            for block in ending:
                self._rounded.finish(block)

    def observe(self, group: Group) -> Seen:
        """The moments of each layer's input; linear layers that take the same tensor share them."""
        modules = {
            n: m for n in group.names if not isinstance(m := self.model.get_submodule(n), nn.Embedding)
        }
        together = group.once and all(isinstance(m, nn.Linear) for m in modules.values())
        watched = list(modules)[:1] if together else list(modules)
        seen = {name: Moments(modules[name], self.beside is not None) for name in watched}
        for index, call in enumerate(self.recording):
            exact: dict[str, list[Tensor]] = {name: [] for name in watched}
            if self.beside is not None:
                with self.beside.running(), self._exact.skipping(index):
                    replay(self.model, [call], watched, _keep_in(exact), group.once)
            with self._rounded.skipping(index):
                replay(self.model, [call], watched, _look_with(seen, exact), group.once)
        for name, moments in seen.items():
            moments.reduce(name)
        return dict.fromkeys(modules, seen[watched[0]]) if together else seen

    def _in_order(self, blocks: list[str], ran: list[str], groups: Sequence[Group]) -> dict[str, int]:
        """The blocks in the order in which they run, each with the index of the group after which it is
        finished; none where they cannot be run one by one."""
        order = ran[: len(blocks)]
        last = {
            block: max(
                (i for i, g in enumerate(groups) if any(inside(n, block) for n in g.names)), default=-1
            )
            for block in order
        }
        if len(blocks) < 2 or set(order) != set(blocks) or ran != order * len(self.recording):
            why = "each of its blocks does not run once in a call" if len(blocks) > 1 else "it has no blocks"
        elif sorted(last.values()) != list(last.values()):
            why = "its blocks do not run one after the other"
        elif not chains(self.model, self.recording[0], order):
            why = "its blocks take more than what the block before gives"
        else:
            return last
        log.info("rounding: runs the model from its input for each of %d groups, as %s", len(groups), why)
        return {}

    def _keep(self, beside: Beside, group: Group, ending: Sequence[str]) -> None:
        """What the float model still needs of layers that are rounded next: nothing in blocks that are
        ``ending`` with them, as what those give in float is known already."""
        for block in ending:
            with beside.running():
                self._exact.finish(block)
        for block in ending:
            beside.forget(block)
        for name in group.names:
            if not any(inside(name, block) for block in ending):
                beside.keep(name)


class _Progress:
    """The blocks that need not run any more, and what they gave."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model, self.recording = model, recording
        self._finished: dict[str, str] = {}
        self._given: list[Given] = [{} for _ in recording]

    def skipping(self, index: int) -> AbstractContextManager[None]:
        """Inside, a call does not run them."""
        return skipped(self.model, self._finished, self._given[index]) if self._finished else nullcontext()

    def finish(self, block: str) -> None:
        """Keep what a block gives from now on."""
        where = list_of(block)
        for index, call in enumerate(self.recording):
            with self.skipping(index):
                self._given[index][where] = output_of(self.model, call, block)
        self._finished[block] = where


@contextmanager
def _watching(model: nn.Module, blocks: Sequence[str]) -> Iterator[list[str]]:
    """Inside, the names of blocks are added to the list when they run."""
    ran: list[str] = []
    handles = [model.get_submodule(b).register_forward_pre_hook(_adding(b, ran)) for b in blocks]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _adding(name: str, ran: list[str]) -> Callable[..., None]:
    return lambda *_: ran.append(name)


def _keep_in(exact: dict[str, list[Tensor]]) -> Callable[[str, Tensor], None]:
    return lambda name, x: exact[name].append(x.clone())  # as the model may go on to change it in place


def _look_with(seen: Seen, exact: dict[str, list[Tensor]]) -> Callable[[str, Tensor], None]:
    return lambda name, x: seen[name].look(x, _same(exact[name], x))


def _same(exact: list[Any], x: Tensor) -> Tensor | None:
    """What entered in the same place of the float model; it may have sent other samples there."""
    found = exact.pop(0) if exact else None
    return found if found is not None and found.shape == x.shape else None
