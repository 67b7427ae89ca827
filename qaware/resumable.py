"""A training loader that a checkpoint remembers, and an order that depends on the epoch alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler


class ResumableLoader(DataLoader[Any]):
    """Goes on in the middle of an epoch: Lightning keeps the ``state_dict`` of a training loader that has one
    in every checkpoint, and begins the epoch again with a loader that has none."""

    _batches = 0
    _resume: tuple[int, int] = (-1, 0)

    def __iter__(self) -> Any:
        """The batches of the sampler's epoch, without those that were trained on before the checkpoint."""
        epoch, batches = self._resume
        self._resume = (-1, 0)
        # A checkpoint may be of an epoch that is over; then the next begins at its first batch.
        self._batches = batches if epoch == self._epoch else 0
        for batch in itertools.islice(super().__iter__(), self._batches, None):
            self._batches += 1
            yield batch

    @property
    def _epoch(self) -> int:
        # A distributed sampler, which Lightning may put in place of ours, has an epoch too.
        return int(getattr(self.sampler, "epoch", 0))

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch the loader is; plain data."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out what was trained on, the next time that this epoch is iterated."""
        self._resume = (state["epoch"], state["batches"])


class Shuffled(RandomSampler):
    """A new order each epoch that depends on nothing else, so that a resumed run sees the same one."""

    def __init__(self, data: Sized, seed: int) -> None:
        super().__init__(data, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
