"""What every engine takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qaware.plan import Plan
from qaware.scheme import Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight as it ships. The value of row r, column c is
    ``(data[r, c] - zero_point[r, c // block]) * scale[r, c // block]``."""

    data: Tensor
    """int8 (rows, width) within the scheme's range; for float16 schemes the float16 values."""
    scale: Tensor | None
    """float32 (rows, width / block), already rounded to the scheme's scale dtype; None for float16."""
    zero_point: Tensor | None
    """int8, the shape of ``scale``; None when symmetric."""
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """float32 (rows, width)."""
        if self.scale is None:
            return self.data.float()
        rows, width = self.data.shape
        blocks = self.data.float().view(rows, self.scale.shape[1], -1)
        if self.zero_point is not None:
            blocks = blocks - self.zero_point.float().unsqueeze(-1)
        return (blocks * self.scale.unsqueeze(-1)).view(rows, width)


@dataclass(frozen=True)
class ActivationRange:
    """A calibrated range of an activation, int8 (-128 to 127) asymmetric per tensor: an integer q stands for
    ``(q - zero_point) * scale``."""

    scale: float
    zero_point: int


@dataclass
class QuantizedModel:
    """A converted model: real integers, the same call signature, not trainable."""

    module: nn.Module
    plan: Plan
    weights: dict[str, QuantizedWeight]
    """By module name, e.g. ``model.layers.0.mlp.down_proj``."""
    activations: dict[str, ActivationRange] = field(default_factory=dict)
    """By module name: what enters a layer whose scheme has a static activation."""
    outputs: dict[str, ActivationRange] = field(default_factory=dict)
    """By site name (see :mod:`qaware.layout`): what leaves a layer or function whose result is an integer."""
    rounding: Any = None
    """A :class:`qaware.rounding.report.RoundingReport` where integers were not chosen by nearest rounding."""

    def save(self, path: str | Path) -> None:
        """Write one file that :func:`qaware.load_quantized` reads; see :mod:`qaware.storage`."""
        from qaware.storage import save

        save(self, Path(path))

    @property
    def bytes(self) -> int:
        """Bytes of all parameters and buffers with integers packed to their width and scales at their
        precision. Shared tensors count once."""
        seen: set[int] = set()
        total = 0
        for weight in self.weights.values():
            if weight.data.data_ptr() not in seen:
                seen.add(weight.data.data_ptr())
                total += packed_bytes(weight)
        for name, tensor in _tensors(self.module):
            prefix, _, key = name.rpartition(".")
            if prefix in self.weights and key in ("weight", "weight_scale", "weight_zero_point"):
                continue
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.numel() * tensor.element_size()
        return total


class Engine(Protocol):
    """Prepare and convert, PyTorch's own two steps."""

    name: str

    def prepare(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Insert fake-quantizers and observers in place; module identity, names and ties stay."""

    def convert(self, model: nn.Module, plan: Plan) -> QuantizedModel:
        """Replace fake-quantizers by integers in place (give it a copy)."""


def packed_bytes(weight: QuantizedWeight) -> int:
    """Bytes of one weight in a format that wastes nothing."""
    bits = weight.data.numel() * weight.scheme.bits
    if weight.scale is not None:
        bits += weight.scale.numel() * (32 if weight.scheme.scale_dtype == "float32" else 16)
    if weight.zero_point is not None:
        bits += weight.zero_point.numel() * weight.scheme.bits
    return (bits + 7) // 8


def float_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a float model, or of a prepared one without its fake-quantizers,
    which do not ship; shared tensors count once."""
    shipped = (t for name, t in _tensors(module) if "_fake_quantizer." not in name)
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in shipped}
    return sum(unique.values())


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
