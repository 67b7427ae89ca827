"""The float model beside the one that is rounded, without a copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qaware.engines.fake_quant import set_fake_quant
from qaware.rounding.blocks import inside


class Beside:
    """Keeps what rounding writes over, for as long as it is needed, and puts it back while the float model is
    to run. Fake-quantizers are on outside."""

    def __init__(self, model: nn.Module, twin: nn.Module | None) -> None:
        """
        Args:
            model: prepared; nothing of it is rounded.
            twin: a copy of it that computes in float, where there is one already: nothing is copied then.
        """
        self.model, self.twin = model, twin
        self._kept: dict[str, list[_Kept]] = {}

    def keep(self, name: str, rows: Tensor | None = None) -> None:
        """The parameters of a layer that is rounded next; of an embedding those ``rows`` of its table, int64
        (rows,), that the recording has use for."""
        ours = _written(self.model.get_submodule(name))
        if self.twin is not None:
            floats = [parameter.detach() for parameter in _written(self.twin.get_submodule(name))]
            self._kept[name] = [_Kept(*pair) for pair in zip(ours, floats, strict=True)]
        elif rows is not None:
            self._kept[name] = [_Kept(ours[0], ours[0].detach()[rows], rows)]
        else:
            self._kept[name] = [_Kept(parameter, parameter.detach().clone()) for parameter in ours]

    def forget(self, block: str) -> None:
        """Those of a block that does not run any more."""
        self._kept = {name: kept for name, kept in self._kept.items() if not inside(name, block)}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model computes in float what it did before it was rounded."""
        kept = [each for found in self._kept.values() for each in found]
        set_fake_quant(self.model, False)
        rounded = [each.swap(each.exact) for each in kept]
        try:
            yield
        finally:
            for each, data in zip(kept, rounded, strict=True):
                each.swap(data)
            set_fake_quant(self.model, True)


@dataclass(frozen=True)
class _Kept:
    """A parameter and what it was in the float model, or some of its rows."""

    parameter: nn.Parameter
    exact: Tensor
    rows: Tensor | None = None

    def swap(self, data: Tensor) -> Tensor:
        """Put ``data`` in its place, and return what was there."""
        if self.rows is None:
            before = self.parameter.data
            self.parameter.data = data
        else:
            before = self.parameter.data[self.rows]
            self.parameter.data[self.rows] = data
        return before


def _written(layer: Any) -> list[nn.Parameter]:
    """What rounding may write to: the weight, the bias, and that of a batch norm folded into the layer."""
    biases = [getattr(owner, "bias", None) for owner in (layer, *getattr(layer, "norm", ()))]
    return [layer.weight, *(bias for bias in biases if bias is not None)]
