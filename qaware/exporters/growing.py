"""Steps of a runtime that is given all keys and values so far, and gives them back with those of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaware.exporters.steps import require_given


class GrowingRunner:
    """The ``step`` of a :class:`qaware.exporters.generation.CachedRunner`.

    Args:
        name: of the file, for errors.
        run: arrays of ids and past to arrays of logits and present.
        shapes: ``(heads, dim)`` of the keys and of the values of each layer.
    """

    def __init__(
        self, name: str, run: Callable[[list[Any]], list[Any]], shapes: list[tuple[int, int]]
    ) -> None:
        self.name, self.run, self.held = name, run, 0
        self.kept: list[Any] = [np.zeros((1, heads, 0, dim), np.float32) for heads, dim in shapes]

    def __call__(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits float32 (1, S, V) of int64 ids (1, S) at ``start``.

        Raises:
            QawareError: the tokens before it were not given.
        """
        require_given(self.name, start, self.held)
        past = [np.ascontiguousarray(array[:, :, :start]) for array in self.kept]
        logits, *self.kept = self.run([input_ids.detach().cpu().contiguous().numpy(), *past])
        self.held = start + input_ids.shape[1]
        return torch.from_numpy(logits)
