"""The float model beside the one that is rounded, without a copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
        self._kept: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}

    def keep(self, name: str) -> None:
        """The parameters of a layer that is rounded next."""
        ours = _written(self.model.get_submodule(name))
        if self.twin is None:
            floats = [parameter.detach().clone() for parameter in ours]
        else:
            floats = [parameter.detach() for parameter in _written(self.twin.get_submodule(name))]
        self._kept[name] = list(zip(ours, floats, strict=True))

    def forget(self, block: str) -> None:
        """Those of a block that does not run any more."""
        self._kept = {name: kept for name, kept in self._kept.items() if not inside(name, block)}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model computes in float what it did before it was rounded."""
        kept = [pair for pairs in self._kept.values() for pair in pairs]
        rounded = [parameter.data for parameter, _ in kept]
        set_fake_quant(self.model, False)
        try:
            for parameter, exact in kept:
                parameter.data = exact
            yield
        finally:
            for (parameter, _), data in zip(kept, rounded, strict=True):
                parameter.data = data
            set_fake_quant(self.model, True)


def _written(layer: Any) -> list[nn.Parameter]:
    """What rounding may write to: the weight, the bias, and that of a batch norm folded into the layer."""
    biases = [getattr(owner, "bias", None) for owner in (layer, *getattr(layer, "norm", ()))]
    return [layer.weight, *(bias for bias in biases if bias is not None)]
