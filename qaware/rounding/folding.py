"""Scales that move from what enters a layer into what makes it; the model computes the same as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qaware.errors import QawareError
from qaware.rounding.recording import Call, Recording

NOT_SCALED = "not scaled"
"""How the note of a layer starts that no scale was folded into."""
_SMALLEST, _LARGEST = 1e-4, 1e4


@dataclass(frozen=True)
class Fold:
    """A place where scales fit: channels of what one layer gives are input channels of others."""

    producer: str
    """A norm, or a linear or convolution layer, by name."""
    first: int
    """Its first output channel that is scaled."""
    size: int
    """How many are."""
    shift: float
    """What a norm adds to its weight before it multiplies with it: 1 in Gemma's, else 0."""
    consumers: tuple[str, ...]
    """All linear and convolution layers that take the channels, whatever becomes of them."""
    channels: Tensor
    """int64 (width,): which of the scaled channels enters at each input channel of a consumer; heads of
    attention that share keys and values have the same ones."""


@torch.no_grad()
def apply_scales(model: nn.Module, fold: Fold, scales: Tensor) -> None:
    """Multiply the consumers' weights and divide the producer's, in place.

    Args:
        model: float.
        fold: found in it by :func:`qaware.rounding.folding_search.find_folds`.
        scales: float32 (size,), positive.
    """
    producer: Any = model.get_submodule(fold.producer)
    part = slice(fold.first, fold.first + fold.size)
    for parameter, shift in ((producer.weight, fold.shift), (getattr(producer, "bias", None), 0.0)):
        if parameter is not None:
            rows = parameter[part]
            divided = (rows.float() + shift) / along(scales, rows, 0) - shift
            rows.copy_(divided)
    for name in fold.consumers:
        weight: Any = model.get_submodule(name).weight
        weight.copy_(weight.float() * along(scales[fold.channels], weight, 1))


def along(scales: Tensor, weight: Tensor, axis: int) -> Tensor:
    """``scales`` in a shape that multiplies ``weight`` along ``axis``."""
    shape = [1] * weight.dim()
    shape[axis] = -1
    return scales.to(weight.device).view(shape)


def per_channel(fold: Fold, values: Tensor, how: str) -> Tensor:
    """One figure for each scaled channel, float32 (size,), of those of the input channels (width,) that it
    enters at; ``how`` is ``mean`` or ``amax``."""
    channels = fold.channels.to(values.device)
    empty = torch.zeros(fold.size, device=values.device)
    return empty.scatter_reduce(0, channels, values.float(), how, include_self=False)


def usable(scales: Tensor) -> Tensor:
    """1 where a channel is dead or its figures are broken; none so far from 1 that float16 would overflow."""
    sound = scales.isfinite() & (scales > 0)
    return torch.where(sound, scales, 1.0).clamp(_SMALLEST, _LARGEST)


class SameOutputs:
    """What a model computes before scales are folded into it, to be compared with what it does after."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        # One call of each kind is enough, and all of a language model's logits would be too many to keep.
        self.calls = list({call.module: call for call in recording}.values())
        self.before = [run_call(model, call) for call in self.calls]

    def require(self, model: nn.Module, step: str) -> None:
        """
        Raises:
            QawareError: ``model`` computes something else now.
        """
        tolerance = 0.1 if any(p.dtype in _HALF for p in model.parameters()) else 1e-2
        for call, before in zip(self.calls, self.before, strict=True):
            if not close(run_call(model, call), before, tolerance):
                what = call.module or type(model).__name__
                raise QawareError(
                    f"rounding: {step} changed what {what} computes when it moved scales between its layers; "
                    f"leave {step} out for this model"
                )


_HALF = (torch.float16, torch.bfloat16)


def run_call(model: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that a recorded call gives."""
    leaves = tree_leaves(call.run(model))
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether tensors agree, up to a share of the largest value of each."""
    return len(ours) == len(theirs) and all(
        _close(a, b, tolerance) for a, b in zip(ours, theirs, strict=True)
    )


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return False
    a, b = a[finite].float(), b[finite].float()
    return a.numel() == 0 or bool((a - b).abs().max() <= tolerance * b.abs().max())
