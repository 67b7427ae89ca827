"""Try a scale on a part of a model: which layers does it reach, and is it gone once they take it back?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qaware.engines.example import Example, capture
from qaware.rounding.folding import Fold, apply_scales, close, run_call
from qaware.rounding.recording import Call

_POWERS = (-2, -1, 1, 2)
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Probe:
    """A module of a model with what enters it, run again and again."""

    def __init__(self, model: nn.Module, name: str, call: Call, layers: Sequence[str]) -> None:
        """
        Args:
            model: float, in evaluation mode.
            name: of the module.
            call: of the model, in which the module runs once.
            layers: names of the layers whose inputs are looked at.
        """
        self.model = model
        self.module = model.get_submodule(name)
        self.layers = {n: model.get_submodule(n) for n in layers}
        self.call = call
        if name != call.module:
            example = capture(self.module, lambda: call.run(model))
            self.call = Call(name, example or Example(), call.buffers)
        self.inputs, self.outputs = self._run()

    def reached(self, producer: str, first: int, size: int, shift: float, wanted: str) -> Fold | None:
        """The fold of a producer's channels into all that they reach as they are, ``wanted`` among it; None
        where that gets something else or where the fold changes what the module computes."""
        # Powers of two are exact in every precision, so what is right is right to the last bit.
        scales = _probing_scales(size).to(self.inputs[wanted].device)
        touched = Fold(producer, first, size, shift, (), torch.empty(0, dtype=torch.int64))
        with self._restored([producer]):
            apply_scales(self.model, touched, scales)
            after, _ = self._run()
        for channels in channel_maps(size, self._width(wanted)):
            expected = scales.reciprocal()[channels]
            if not self._scaled(wanted, after, expected):
                continue
            consumers = tuple(n for n in self.inputs if self._scaled(n, after, expected))
            fold = Fold(producer, first, size, shift, consumers, channels.cpu())
            return fold if self._leaves_the_same(fold, scales) else None
        return None

    def _leaves_the_same(self, fold: Fold, scales: Tensor) -> bool:
        with self._restored([fold.producer, *fold.consumers]):
            apply_scales(self.model, fold, scales)
            inputs, outputs = self._run()
        others = [n for n in self.inputs if n not in fold.consumers and n in inputs]
        before = [*self.outputs, *(self.inputs[n] for n in others)]
        return close([*outputs, *(inputs[n] for n in others)], before, self._tolerance)

    def _width(self, name: str) -> int:
        weight: Any = self.layers[name].weight
        return int(weight.shape[1])

    def _scaled(self, name: str, after: dict[str, Tensor], expected: Tensor) -> bool:
        """Whether each input channel of a layer is what it was, times what is expected of it."""
        if name not in after or self._width(name) != len(expected):
            return False
        before, now = (channels_last(self.layers[name], t[name]) for t in (self.inputs, after))
        if before.shape != now.shape:
            return False
        aim = before * expected
        return bool(((now - aim).abs().amax(0) <= self._tolerance * aim.abs().amax(0)).all())

    @property
    def _tolerance(self) -> float:
        return max((_TOLERANCE.get(p.dtype, 1e-3) for p in self.module.parameters()), default=1e-3)

    @torch.no_grad()
    def _run(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What enters each layer, and what the module gives."""
        inputs: dict[str, Tensor] = {}
        hooks = [
            m.register_forward_pre_hook(_keep(inputs, n), with_kwargs=True) for n, m in self.layers.items()
        ]
        try:
            outputs = run_call(self.model, self.call)
        finally:
            for hook in hooks:
                hook.remove()
        return inputs, outputs

    @contextmanager
    def _restored(self, names: Sequence[str]) -> Iterator[None]:
        parameters = [p for name in names for p in self.model.get_submodule(name).parameters(recurse=False)]
        kept = [p.detach().clone() for p in parameters]
        try:
            yield
        finally:
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.data.copy_(values)


def channel_maps(size: int, width: int) -> Iterator[Tensor]:
    """The ways in which ``size`` channels may enter at ``width``, int64 (width,): as they are; each repeated,
    as by flattening an image; or in heads of which each is repeated, as keys and values are."""
    if width % size:
        return
    for head in (h for h in range(1, size + 1) if size % h == 0):
        yield torch.arange(size).view(-1, 1, head).expand(-1, width // size, -1).flatten()
        if size == width:
            return


def channels_last(layer: Any, x: Tensor) -> Tensor:
    """float32 (samples, width) of what enters a linear or convolution layer."""
    spatial = 0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2
    return x.detach().float().movedim(-1 - spatial, -1).flatten(0, -2)


def _probing_scales(size: int) -> Tensor:
    """Positive, none of them 1."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return 2.0 ** torch.tensor(_POWERS)[order % len(_POWERS)].float()


def _keep(inputs: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[name] = (args[0] if args else kwargs["input"]).detach().clone()

    return hook
