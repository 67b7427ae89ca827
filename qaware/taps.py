"""Look into a model while it runs: what layers return, and how much is clipped when it is rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from qaware.engines.base import ActivationRange, QuantizedModel
from qaware.engines.static_integer import INT8, Arithmetic, IntegerLayer, Requantize

SAMPLE = 1 << 20
"""Values of one output that are kept at most."""


class Taps:
    """Samples of what named modules return, in the order in which they first run."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        wanted = set(names)
        self.modules = {name: module for name, module in model.named_modules() if name in wanted}
        self.outputs: dict[str, list[Tensor]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Taps:
        for name, module in self.modules.items():
            self._hooks.append(module.register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                flat = output.detach().flatten()
                # A copy: the model may go on to change its tensor in place.
                sample = flat[:: max(1, math.ceil(flat.numel() / SAMPLE))].float().clone()
                self.outputs.setdefault(name, []).append(sample)

        return hook


class Clipping:
    """Counts the values that are beyond their int8 range when they are rounded."""

    def __init__(self, model: nn.Module, quantized: QuantizedModel) -> None:
        self.model = model
        self.quantized = quantized
        self._counts: dict[tuple[str, str], tuple[int, int]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Clipping:
        for name, module in self.model.named_modules():
            if isinstance(module, IntegerLayer):
                module.arithmetic = _CountingArithmetic(self, name, module.output_grid)
            elif isinstance(module, Requantize):
                site = name.removesuffix(".quantizer")
                module.arithmetic = _CountingArithmetic(self, site, module.grid)
            if name in self.quantized.activations:
                self._hooks.append(module.register_forward_pre_hook(self._look(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, name: str) -> Callable[..., None]:
        grid = self.quantized.activations[name]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.count((name, "input"), args[0], grid)

        return hook

    def count(self, key: tuple[str, str], x: Tensor, grid: ActivationRange) -> None:
        """Add the values of ``x`` to those of one side of a layer."""
        integers = (x.detach().float() / grid.scale).round() + grid.zero_point
        outside = int(((integers < INT8[0]) | (integers > INT8[1])).sum())
        clipped, total = self._counts.get(key, (0, 0))
        self._counts[key] = clipped + outside, total + x.numel()

    def share(self, name: str, side: str) -> float | None:
        """Clipped values over all; None where nothing was rounded."""
        clipped, total = self._counts.get((name, side), (0, 0))
        return clipped / total if total else None


class _CountingArithmetic(Arithmetic):
    """Tells of what is rounded to the grid of a site's output, which no hook of the layer sees."""

    def __init__(self, counts: Clipping, site: str, output: ActivationRange | None) -> None:
        self.counts = counts
        self.site = site
        self.output = output

    def round_trip(self, x: Tensor, grid: ActivationRange) -> Tensor:
        """As it was."""
        if grid is self.output:
            self.counts.count((self.site, "output"), x, grid)
        return super().round_trip(x, grid)
