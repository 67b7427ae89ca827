"""What a rounding method knows of a layer's input: its first and second moments, summed over all ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.errors import QawareError


class Moments:
    """Sums over the rows (samples, width) that a layer multiplies its weight with.

    For a convolution a row is one patch; a grouped one has its own rows for each group.
    """

    reduction: ClassVar[dict[str, str]] = {"count": "sum", "total": "sum", "products": "sum"}

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.groups = int(getattr(layer, "groups", 1))
        width = self.layer.weight[0].numel()
        device = self.layer.weight.device
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        """Samples."""
        self.total = torch.zeros(self.groups, width, device=device)
        """float32 (groups, width): sums."""
        self.products = torch.zeros(self.groups, width, width, device=device)
        """float32 (groups, width, width): sums of products."""

    def look(self, x: Tensor) -> None:
        """Add what enters the layer, in the shape that it takes."""
        rows = patches(self.layer, x.detach().float())
        self.count += rows.shape[1]
        self.total += rows.sum(1)
        self.products += rows.transpose(1, 2) @ rows

    def reduce(self, name: str) -> None:
        """Make the sums those of all ranks.

        Raises:
            QawareError: layer ``name`` saw NaN or infinity.
        """
        if dist.is_available() and dist.is_initialized():
            for key in self.reduction:
                dist.all_reduce(getattr(self, key))
        if not bool(self.products.isfinite().all()):
            raise QawareError(
                f"{name}: calibration gave NaN or infinity as its input; look for broken samples in the data"
            )

    @property
    def seen(self) -> bool:
        """Whether anything entered."""
        return bool(self.count > 0)

    @property
    def hessian(self) -> Tensor:
        """float32 (groups, width, width): the mean of x x^T, which is, up to a factor, the Hessian of the
        squared error of the output with respect to a row of the weight."""
        return self.products / self.count.clamp(min=1).float()

    @property
    def mean(self) -> Tensor:
        """float32 (groups, width)."""
        return self.total / self.count.clamp(min=1).float()


def patches(layer: Any, x: Tensor) -> Tensor:
    """The rows that ``layer`` multiplies its weight with, (groups, samples, width)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(layer, nn.Conv1d):
        x, size = x.unsqueeze(-2), (1, *layer.kernel_size)
        stride, dilation = (1, *layer.stride), (1, *layer.dilation)
    else:
        size, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padding = layer._reversed_padding_repeated_twice
    x = F.pad(x.squeeze(-2), padding, mode).unsqueeze(-2) if isinstance(layer, nn.Conv1d) else F.pad(x, padding, mode)
    columns = F.unfold(x, size, dilation, 0, stride)  # (batch, channels * kernel, places)
    grouped = columns.view(len(columns), layer.groups, -1, columns.shape[-1])
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)
