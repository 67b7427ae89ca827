"""What was computed from a frozen weight, kept for as long as the weight stays as it is.

Beside adapters, and where layers are frozen for fine-tuning, most weights are the same in every step, and
so is what they are rounded to. Autograd holds the rounded weight until the backward pass anyway; kept, it
takes its memory between the steps too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLE = 256


class Kept:
    """Tensors that follow from one frozen weight. A copy of it, in another process too, begins empty.

    The weight is known by the object, which is held, its version, its place in memory and, on a CPU, every
    so many of its values. Who writes to a frozen weight behind autograd's back (``weight.data.copy_()``) is
    seen by those values alone, and on a GPU, where a look at them would wait for all of its work, not at
    all: write under ``torch.no_grad()``, as optimizers, ``load_state_dict`` and averaging callbacks do.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, the weight too."""
        self._weight: Tensor | None = None
        self._about: tuple[Any, ...] = ()
        self._sample: Tensor | None = None
        self._values: tuple[Tensor, ...] = ()
        self._versions: list[int] = []

    def of(
        self, weight: Tensor, about: tuple[Any, ...], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``make`` gave when it was called last, if nothing has changed; without a gradient.

        Args:
            weight: what ``make`` reads. Nothing is kept of one that may train, outside of training, in a
                traced or compiled pass, and in distributed training, where a weight may be a passing copy.
            about: what else it depends on, compared by identity.
            make: called where there is nothing that fits.
        """
        if not _may_be_kept(weight):
            if not _is_traced() and weight.requires_grad:
                self.clear()
            return make()
        if not self._fits(weight, about):
            self._keep(weight, about, make())
        return self._values

    def _fits(self, weight: Tensor, about: tuple[Any, ...]) -> bool:
        if self._weight is not weight or self._versions != [value._version for value in self._values]:
            return False
        known = (weight._version, weight.data_ptr(), *about)
        if len(known) != len(self._about) or any(a is not b and a != b for a, b in _pairs(known, self._about)):
            return False
        return self._sample is None or torch.equal(self._sample, _sample(weight))

    def _keep(self, weight: Tensor, about: tuple[Any, ...], values: tuple[Tensor, ...]) -> None:
        self._weight, self._values = weight, values
        self._about = (weight._version, weight.data_ptr(), *about)
        self._sample = _sample(weight) if weight.is_cpu else None
        self._versions = [value._version for value in values]

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()
