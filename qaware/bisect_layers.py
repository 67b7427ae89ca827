"""After a parity failure: the first layer that a runtime computes otherwise.

A runtime shows its output only. So the model is exported again, with the result of one of its layers as the
output, and the layer is searched for by halves.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Exporter, Runner, Tolerance
from qaware.exporters.signature import Deployable, Signature, first_tensor
from qaware.parity import Parity, compare
from qaware.taps import Taps

Open = Callable[[Artifact], AbstractContextManager[Runner]]
"""Loads an artifact, and closes it again."""
Inputs = Sequence[tuple[Tensor, ...]]
_ROUNDING = 1.0


class _Reached(Exception):
    """Ends a run at the module whose result is wanted."""


class UpTo(Deployable):
    """Returns what one of the model's modules does in its first call."""

    def __init__(self, module: nn.Module, keywords: tuple[str | None, ...], site: str, stop: bool) -> None:
        super().__init__(module, keywords)
        self.site = site
        self.stop = stop

    def forward(self, *tensors: Tensor) -> Tensor:
        """The first tensor that the site returns."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append(first_tensor(output))
            if self.stop:
                raise _Reached

        hook = self.module.get_submodule(self.site).register_forward_hook(keep)
        try:
            super().forward(*tensors)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]


@dataclass(frozen=True)
class UpToSignature(Signature):
    """A signature whose wrapped model returns the result of one module."""

    site: str = ""
    """Name of that module."""
    stop: bool = False
    """Whether the run ends there. torch.export does not follow a run that ends inside modules, and drops what
    the output does not need; torch_to_nnef follows it, and must not meet weights that are not needed."""

    def wrap(self, module: nn.Module) -> Deployable:
        """``module`` as something that every exporter can trace."""
        return UpTo(module, tuple(spec.keyword for spec in self.inputs), self.site, self.stop)


@dataclass
class Search:
    """Everything that an export up to a layer needs."""

    exporter: Exporter
    quantized: QuantizedModel
    example: tuple[Tensor, ...]
    signature: Signature
    inputs: Inputs
    """Those of the parity check."""
    open_runner: Open
    folder: Path
    """For a moment, the shortened models are here."""

    def parity(self, names: Sequence[str]) -> Parity:
        """Of the last of ``names``, which are all layers that run up to it.

        Raises:
            QawareError: the runtime refuses the shortened model.
        """
        try:
            return self._parity(self.quantized, names[-1], stop=False)
        except QawareError:
            return self._parity(_without_later(self.quantized, names), names[-1], stop=True)

    def _parity(self, quantized: QuantizedModel, site: str, stop: bool) -> Parity:
        parts = self.signature.inputs, self.signature.symbols
        signature = UpToSignature(*parts, site=site, stop=stop)
        reference = signature.wrap(self.exporter.reference(quantized))
        grid = quantized.outputs.get(site)
        with tempfile.TemporaryDirectory(prefix=".qaware-", dir=self.folder) as folder:
            path = Path(folder) / f"model{self.exporter.suffix}"
            artifact = self.exporter.export(quantized, self.example, signature, path)
            with self.open_runner(artifact) as runner:
                return compare(runner, reference, self.inputs, [] if grid is None else [grid])


def first_difference(search: Search, limit: float) -> str | None:
    """The first layer, in the order in which they run, whose result differs.

    Each export rules out half of what is left, so 100 layers take 7.

    Args:
        search: the model whose artifact failed.
        limit: seconds after which no further export begins.

    Returns:
        E.g. ``first layer that differs: layer1.0.conv2 (3 steps)``. None where it was not found: every
        layer's result is right, the layers are parts of one graph, the tools refuse a shortened model, or
        time is up.
    """
    deadline = time.monotonic() + limit
    names = run_order(search.quantized, search.signature, search.example)
    tolerance = search.exporter.tolerance_for(search.quantized.plan)
    low, high, found = 0, len(names), None
    while low < high:
        if time.monotonic() >= deadline:
            return None
        middle = (low + high) // 2
        try:
            parity = search.parity(names[: middle + 1])
        except Exception:  # whatever tools make of half a model; what failed before is the error to report
            return None
        if _close(parity, tolerance):
            low = middle + 1
        else:
            high, found = middle, parity
    return None if found is None else f"first layer that differs: {names[high]} ({_size(found)})"


@torch.no_grad()
def run_order(quantized: QuantizedModel, signature: Signature, example: tuple[Tensor, ...]) -> list[str]:
    """Quantized layers and rounded functions in the order of their first run; empty for a graph."""
    taps = Taps(quantized.module, {*quantized.weights, *quantized.outputs})
    with taps:
        signature.wrap(quantized.module)(*example)
    return list(taps.outputs)


def _without_later(quantized: QuantizedModel, names: Sequence[str]) -> QuantizedModel:
    """A copy without the layers that have not run yet."""
    work = copy.deepcopy(quantized)
    for name in quantized.weights.keys() - set(names):
        work.module.set_submodule(name, nn.Identity())
    return dataclasses.replace(work, weights={n: w for n, w in work.weights.items() if n in names})


def _close(parity: Parity, tolerance: Tolerance) -> bool:
    """In steps where there are any, of which sums in another order make one. KL is for logits, not for the
    inside of a model."""
    if parity.steps is not None:
        counted = (
            tolerance if tolerance.steps is not None else dataclasses.replace(tolerance, steps=_ROUNDING)
        )
        return parity.within_steps(counted)
    return parity.relative <= tolerance.relative


def _size(parity: Parity) -> str:
    return f"relative difference {parity.relative:.1e}" if parity.steps is None else f"{parity.steps:g} steps"
