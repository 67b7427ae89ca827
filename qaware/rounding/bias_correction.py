"""Add to a layer's bias what its rounding takes from the mean of its output.

Nagel et al., "Data-free quantization through weight equalization and bias correction" (ICCV 2019,
arXiv:1906.04721), section 4.2, with the mean of the input taken from calibration data as in its appendix D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qaware.rounding.moments import Moments


@torch.no_grad()
def correct_bias(layer: Any, change: Tensor, moments: Moments | None) -> str:
    """Take the mean of ``change`` times the input from the bias of a prepared layer, or of the batch norm that
    is folded into it.

    Args:
        layer: changes in place.
        change: float32 (rows, width), the rounded weight less the weight as it was.
        moments: of the layer's input; None for a layer without.

    Returns:
        Why nothing was done, or an empty text.
    """
    norm = next(iter(getattr(layer, "norm", ())), None)
    bias = getattr(layer, "bias", None) if norm is None else norm.bias
    if moments is None or not moments.seen:
        return "bias not corrected: no input was seen"
    if bias is None:
        return "bias not corrected: there is none"
    grouped = change.view(moments.groups, -1, change.shape[1])
    shift = torch.einsum("grw,gw->gr", grouped, moments.mean).flatten()
    bias.data.sub_(shift.to(bias.dtype))
    return ""
