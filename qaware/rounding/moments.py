"""What a rounding method knows of a layer's input: its first and second moments, summed over all ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.errors import QawareError


class Moments:
    """Means over the rows (samples, width) that a layer multiplies its weight with: sums, until
    :meth:`reduce` makes means of them in place.

    For a convolution a row is one patch; a grouped one has its own rows for each group.
    """

    reduction: ClassVar[dict[str, str]] = {
        "count": "sum",
        "mean": "sum",
        "hessian": "sum",
        "drift": "sum",
        "exact": "sum",
    }

    def __init__(self, layer: Any, beside: bool = False) -> None:
        """
        Args:
            layer: a linear one or a convolution.
            beside: look at what enters the layer in the float model too.
        """
        self.layer = layer
        self.groups = int(getattr(layer, "groups", 1))
        width = self.layer.weight[0].numel()
        device = self.layer.weight.device
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        """Samples."""
        self.mean = torch.zeros(self.groups, width, device=device)
        """float32 (groups, width)."""
        self.hessian = torch.zeros(self.groups, width, width, device=device)
        """float32 (groups, width, width): of x x^T, which is, up to a factor, the Hessian of the squared
        error of the output with respect to a row of the weight."""
        self.drift: Tensor | None = torch.zeros_like(self.hessian) if beside else None
        """float32 (groups, width, width): of (y - x) x^T, with y what enters in the float model; None where
        that was not looked at."""
        self.exact: Tensor | None = torch.zeros_like(self.mean) if beside else None
        """float32 (groups, width): of y, where that was looked at."""
        self.worked_out: dict[Any, Any] = {}
        """What a step made of these, by the step, for all rows of the layers that share them."""

    def look(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add what enters the layer, in the shape that it takes, and, where it is wanted, what enters it in
        the float model."""
        rows = patches(self.layer, x.detach().float())
        self.count += rows.shape[1]
        self.mean += rows.sum(1)
        self.hessian.baddbmm_(rows.mT, rows)
        if self.drift is not None and self.exact is not None:
            other = rows if exact is None else patches(self.layer, exact.detach().float())
            self.exact += other.sum(1)
            if exact is not None:
                self.drift.baddbmm_((other - rows).mT, rows)

    def reduce(self, name: str) -> None:
        """Make the sums means over the rows of all ranks.

        Raises:
            QawareError: layer ``name`` saw NaN or infinity.
        """
        sums = [getattr(self, key) for key in self.reduction if getattr(self, key) is not None]
        if dist.is_available() and dist.is_initialized():
            for each in sums:
                dist.all_reduce(each)
        if not all(bool(end.isfinite()) for end in self.hessian.aminmax()):
            raise QawareError(
                f"{name}: calibration gave NaN or infinity as its input; look for broken samples in the data"
            )
        for each in sums[1:]:
            each /= self.count.clamp(min=1).float()

    @property
    def seen(self) -> bool:
        """Whether anything entered."""
        return bool(self.count > 0)

    @property
    def exact_mean(self) -> Tensor:
        """float32 (groups, width): the mean of what enters in the float model, where that was looked at."""
        return self.mean if self.exact is None else self.exact


def patches(layer: Any, x: Tensor) -> Tensor:
    """The rows that ``layer`` multiplies its weight with, (groups, samples, width)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    places = len(layer.kernel_size)
    x = x.view(-1, *x.shape[-places - 1 :])  # one without a batch is a batch of one
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    x = x.unsqueeze(-2) if places == 1 else x
    size, dilation, stride = (
        (1,) * (2 - places) + tuple(v) for v in (layer.kernel_size, layer.dilation, layer.stride)
    )
    columns = F.unfold(x, size, dilation, 0, stride)  # (batch, channels * kernel, samples of each)
    grouped = columns.view(len(columns), layer.groups, -1, columns.shape[-1])
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)
