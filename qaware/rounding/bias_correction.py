"""Add to a layer's bias what rounding takes from the mean of its output.

Nagel et al., "Data-free quantization through weight equalization and bias correction" (ICCV 2019,
arXiv:1906.04721), section 4.2, with the means of the inputs taken from calibration data as in its appendix D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qaware.rounding.moments import Moments


@torch.no_grad()
def correct_bias(layer: Any, weight: Tensor, rounded: Tensor, moments: Moments | None) -> str:
    """Give a prepared layer the mean output that it has in the float model, by its bias or that of the batch
    norm that is folded into it.

    Args:
        layer: changes in place.
        weight: float32 (rows, width), as it was.
        rounded: the same, as it ships.
        moments: of the layer's input; None for a layer without.

    Returns:
        Why nothing was done, or an empty text.
    """
    if isinstance(layer, nn.Embedding):
        return ""
    norm = next(iter(getattr(layer, "norm", ())), None)
    bias = getattr(layer, "bias", None) if norm is None else norm.bias
    if bias is None:
        return "no bias to correct"
    if moments is None or not moments.seen:
        return "bias not corrected, as no input was seen"
    shift = _mean_output(rounded, moments.mean) - _mean_output(weight, moments.exact_mean)
    bias.data.sub_(shift.to(bias.dtype))
    return ""


def _mean_output(weight: Tensor, mean: Tensor) -> Tensor:
    """(rows,) of (rows, width) and the mean input (groups, width)."""
    grouped = weight.view(len(mean), -1, weight.shape[1])
    return torch.einsum("grw,gw->gr", grouped, mean).flatten()
