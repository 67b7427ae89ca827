"""A training loader that a checkpoint stops and resumes in mid-epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class Resumable(DataLoader[Any]):
    """Goes on after the batches that were trained on when the checkpoint was saved."""

    _done = _skip = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        self._done = skip
        for batch in itertools.islice(super().__iter__(), skip, None):
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["done"] % len(self)
