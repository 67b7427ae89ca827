"""The smallest and largest value that an activation took."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class MinMaxObserver(nn.Module):
    """Running minimum and maximum of a tensor, exact for any order and number of ranks.

    The buffers have their final shape from the start, so that checkpoints, averaging and broadcasting
    see them. ``observing`` and ``pass_index`` are plain attributes: averaging callbacks swap buffers, and a
    flag must not be swapped with them.
    """

    reduction: ClassVar[dict[str, str]] = {"min_val": "min", "max_val": "max"}
    """How each statistic is combined over ranks."""
    passes: ClassVar[int] = 1
    """How often the same data must be seen."""
    exact: ClassVar[bool] = True
    """Whether the range is that of all values, with none left out."""

    min_val: Tensor
    max_val: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.observing = False
        self.pass_index = 0
        self.register_buffer("min_val", torch.tensor(math.inf))
        self.register_buffer("max_val", torch.tensor(-math.inf))

    def reset_parameters(self) -> None:
        """Forget the statistics; also called after they were materialized from the meta device."""
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MinMaxObserver:
        """Follow the model to another device, not to another precision: in bfloat16 a moving average
        stands still, and sums lose what they counted."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    @property
    def covers(self) -> bool:
        """Whether all that was looked at just now is in the range, unless it overflowed."""
        return self.observing and self.exact

    @property
    def seen(self) -> bool:
        """Whether any value was observed."""
        return bool(self.min_val <= self.max_val)

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        """Take ``x`` (any shape, any float dtype) into the statistics when ``observing``.

        The recomputation of activation checkpointing runs inside backward; it must not count twice. A
        batch that overflowed is passed over: mixed precision skips its step too, and an infinite range
        would stay.
        """
        if x.numel() and self._looks():
            self._weigh(x, *torch.aminmax(x.detach().float()))

    @torch.no_grad()
    def look_at_ends(self, low: Tensor, high: Tensor) -> None:
        """:meth:`forward` of a tensor with these extremes, float32 scalars; for one pass."""
        if self._looks():
            self._weigh(low, low, high)

    def _looks(self) -> bool:
        return self.observing and not _in_backward()

    def _weigh(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self._take(x, low, high, high - low < math.inf)  # not so for NaN either

    def _take(self, x: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        self.min_val.copy_(torch.where(finite, torch.minimum(self.min_val, low), self.min_val))
        self.max_val.copy_(torch.where(finite, torch.maximum(self.max_val, high), self.max_val))

    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum, float32 scalars."""
        return self.min_val, self.max_val


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
