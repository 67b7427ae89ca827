"""What every rounding method takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qaware.plan import Plan
from qaware.rounding.grid import Grid
from qaware.rounding.moments import Moments
from qaware.rounding.recording import Recording

_SMALLEST_FACTOR = 1e-12


@dataclass(frozen=True)
class Chosen:
    """The integers of one weight, as the values that they stand for."""

    weight: Tensor
    """float32 (rows, width), on the grid of ``scale`` and ``zero_point``."""
    scale: Tensor
    """float32 (rows, width / block), legal in the grid's precision."""
    zero_point: Tensor
    """int32, the shape of ``scale``."""
    note: str = ""
    """Why it was chosen in another way than asked for, if it was."""
    target: Tensor | None = None
    """float32 (rows, width), what was rounded, where it is not the weight of the layer."""


class Chooser(Protocol):
    """Chooses integers: ``choose`` of a module such as :mod:`qaware.rounding.mse`."""

    def __call__(self, weight: Tensor, grid: Grid, step: Any, moments: Moments | None) -> Chosen:
        """
        Args:
            weight: float32 (rows, width), as it ships: a batch norm is folded into it.
            grid: what it may become.
            step: the options, e.g. a :class:`qaware.roundings.Gptq`.
            moments: of the input; None for an embedding, a layer that never ran, and a step without data.
        """


class Folder(Protocol):
    """Folds scales into other layers, and leaves what the model computes as it is: ``fold`` of a module such
    as :mod:`qaware.rounding.awq`."""

    def __call__(self, model: nn.Module, plan: Plan, recording: Recording, step: Any) -> dict[str, str]:
        """
        Args:
            model: float, in evaluation mode; changes in place.
            plan: made for it.
            recording: of the calibration batches.
            step: the options, e.g. a :class:`qaware.roundings.Awq`.

        Returns:
            For each quantized layer, by name, what was done to it or why nothing was.
        """


def shipped_weight(layer: Any, rows: slice = slice(None)) -> Tensor:
    """Rows of the weight of a prepared layer as they ship, float32 (rows, width)."""
    folded = layer.folded()[0] if hasattr(layer, "folded") else layer.weight
    weight: Tensor = folded.detach()[rows].float().flatten(1)
    return weight.clone()  # as writing changes the layer in place


@torch.no_grad()
def write_rows(layer: Any, rows: slice, chosen: Tensor) -> None:
    """Rows of a prepared layer's weight become what was chosen, float32 (rows, width)."""
    weight = chosen.view(layer.weight[rows].shape)
    if getattr(layer, "norm", ()):  # what is left of it is multiplied by the folded batch norm's factor
        factor = layer._scaled(torch.ones_like(weight), layer._factor())
        # A channel that the norm switches off stays as it is.
        weight = torch.where(factor.abs() > _SMALLEST_FACTOR, weight / factor, layer.weight.float())
    layer.weight.data[rows] = weight.to(layer.weight.dtype)


def fix(layer: Any, scale: Tensor, zero_point: Tensor) -> None:
    """A prepared layer's fake-quantizer keeps the scales of its whole weight, on which rounding what was
    written to nearest gives the same integers again."""
    precision = getattr(torch, layer.weight_fake_quantizer.scheme.scale_dtype)
    if not bool(zero_point.any()):  # one zero stands for as many as there are scales
        zero_point = zero_point.new_zeros(()).expand(zero_point.shape)
    layer.weight_fake_quantizer.fixed = (scale.to(precision), zero_point)
