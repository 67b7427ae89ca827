"""What was computed from a frozen weight, kept for as long as the weight stays as it is.

Beside adapters, and where layers are frozen for fine-tuning, most weights are the same in every step, and
so is what they are rounded to. Autograd holds the rounded weight until the backward pass anyway; kept, it
takes its memory between the steps too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Kept:
    """Tensors that follow from one frozen weight. A copy of it, in another process too, begins empty.

    The weight is known by the object, which is held, its version, its place in memory and, on a CPU, a sum
    of its bits: averaging callbacks write through ``weight.data``, which autograd does not count. On a GPU,
    where to look at the sum would be to wait for all of its work, such a write to a frozen weight is not
    noticed; what trains is never kept, and a ``load_state_dict`` is counted.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, the weight too."""
        self._weight: Tensor | None = None
        self._about: tuple[Any, ...] = ()
        self._state: list[Any] = []
        self._values: tuple[Tensor, ...] = ()

    def of(self, weight: Tensor, about: tuple[Any, ...], make: Callable[[], tuple[Tensor, ...]]) -> Any:
        """What ``make`` gives, which is called only where something has changed since it was called last.

        Args:
            weight: what ``make`` reads. Nothing is kept of one that trains, nor outside of training, where
                memory may be short, nor in compiled and in distributed training, where a weight may be a
                copy that passes.
            about: what else it depends on, objects that are the same ones when nothing has changed.
            make: the tensors, not to be changed in place.
        """
        if not _lasts(weight):
            if self._weight is not None and weight.requires_grad:
                self.clear()  # it may be frozen again, after an optimizer that autograd does not count
            return make()
        if not (self._same(weight, about) and self._state == _state(weight, self._values)):
            self._values = make()
            self._weight, self._about, self._state = weight, about, _state(weight, self._values)
        return self._values

    def _same(self, weight: Tensor, about: tuple[Any, ...]) -> bool:
        return self._weight is weight and all(a is b for a, b in zip(about, self._about, strict=True))

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def _lasts(weight: Tensor) -> bool:
    """Whether ``weight`` is a frozen parameter that the next step will see again."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and not weight.is_inference()
        and not (dist.is_available() and dist.is_initialized())
    )


def _state(weight: Tensor, values: tuple[Tensor, ...]) -> list[Any]:
    """What is different after somebody wrote to one of them."""
    versions = [tensor._version for tensor in (weight, *values)]
    return [versions, weight.data_ptr(), weight.dtype, _sum_of_bits(weight) if weight.is_cpu else None]


def _sum_of_bits(weight: Tensor) -> int:
    flat = weight.detach().flatten()
    words = torch.int64 if flat.numel() * flat.element_size() % 8 == 0 else torch.uint8
    return int(flat.view(words).sum())
