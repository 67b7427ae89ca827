"""Fake-quantizers inside an exported graph: those of the other engines, in the form that PT2E handles.

torchao's own keep moving averages of a weight's range, so the integers of the last step are not those that
ship, and their switches are buffers, which averaging callbacks swap. Here a weight's range comes from the
weight at each forward pass, an activation's from an observer of qaware, and switches are plain attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from qaware.engines.activation_fake_quant import INT8, StaticFakeQuantizer, TokenFakeQuantizer
from qaware.engines.base import ActivationRange, QuantizedWeight
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.scheme import Scheme

_FLAGS = ("fake_quant_enabled", "observer_enabled")
_UNSIGNED = 128
"""What is added to an int8 zero point where a kernel takes uint8; the values are the same."""


class Constructor:
    """Makes one kind of fake-quantizer, in place of PyTorch's partial functions: the quantizer's annotation
    says where, the scheme says how."""

    __name__ = "qaware"

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def with_args(self, **_: Any) -> Callable[[], nn.Module]:
        """What torchao calls, with the fields of its specification, and then calls the result."""
        return self.make


class GraphWeightFakeQuantizer(WeightFakeQuantizer, FakeQuantizeBase):
    """int8 of a weight in its own shape, with one scale for each output channel or one for all."""

    dtype = torch.int8
    ch_axis = 0
    is_dynamic = False

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme, narrow=True)
        _drop_flags(self)
        self.quant_min, self.quant_max = self.integers
        self.qscheme = torch.per_tensor_symmetric if scheme.per_tensor else torch.per_channel_symmetric

    def forward(self, x: Tensor, grid: Tensor | None = None, unit: Tensor | None = None) -> Tensor:
        """Same shape and dtype as ``x`` (rows, ...)."""
        return super().forward(x.flatten(1), grid, unit).view_as(x)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the last forward pass, (rows,)."""
        return self.scale.flatten(), self.zero_point.flatten()

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """The integers of ``weight`` (rows, ...), by the arithmetic of the forward pass."""
        rows = weight.detach().float().flatten(1)
        scale, _ = self._qparams(rows)
        data = (rows * (1.0 / scale)).round().clamp(*self.integers).to(torch.int8)
        return QuantizedWeight(data, scale.contiguous(), None, self.scheme)


class GraphActivationFakeQuantizer(StaticFakeQuantizer, FakeQuantizeBase):
    """int8, or uint8 of the same values, with one observed range."""

    qscheme = torch.per_tensor_affine
    ch_axis = -1
    is_dynamic = False

    def __init__(self, observer: str, unsigned: bool) -> None:
        super().__init__(observer)
        _drop_flags(self)
        self.dtype = torch.uint8 if unsigned else torch.int8
        self.shift = _UNSIGNED if unsigned else 0
        self.quant_min, self.quant_max = (bound + self.shift for bound in INT8)
        self.fixed: ActivationRange | None = None
        """Instead of what was observed: the range of a model that was saved."""

    def qparams(self) -> tuple[Tensor, Tensor]:
        """See :class:`StaticFakeQuantizer`."""
        if self.fixed is None:
            return super().qparams()
        return torch.tensor(self.fixed.scale), torch.tensor(self.fixed.zero_point, dtype=torch.int32)

    def forward(self, x: Tensor, observe: bool = True, rounds: bool = True) -> Tensor:
        """Same shape and dtype as ``x``.

        Args:
            x: what is rounded.
            observe: whether the observer may look: what was pooled or is part of what it sees elsewhere
                would count twice.
            rounds: False where ``x`` is on the grid already, or is but for the scaling of dropout.
        """
        if not rounds:
            return x
        if observe:
            return super().forward(x)
        looking, self.observer.observing = self.observer.observing, False
        try:
            return super().forward(x)
        finally:
            self.observer.observing = looking

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point in the terms of ``dtype``.

        Raises:
            QawareError: nothing finite was observed yet.
        """
        scale, zero_point = self.qparams()
        return scale, zero_point + self.shift

    @property
    def range(self) -> ActivationRange:
        """The range in the terms of int8."""
        scale, zero_point = self.qparams()
        return ActivationRange(float(scale), int(zero_point))


class GraphDynamicFakeQuantizer(TokenFakeQuantizer, FakeQuantizeBase):
    """int8 with the range that the tensor has right now, all of it at once as PT2E writes it down.

    XNNPACK reads this as a range for each row when it runs, and rounds a little better than trained.
    """

    qscheme = torch.per_tensor_affine
    ch_axis = -1
    is_dynamic = True
    eps = torch.finfo(torch.float32).eps

    def __init__(self, unsigned: bool) -> None:
        super().__init__()
        _drop_flags(self)
        self.dtype = torch.uint8 if unsigned else torch.int8
        shift = _UNSIGNED if unsigned else 0
        self.quant_min, self.quant_max = (bound + shift for bound in INT8)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        if not self.enabled:
            return x
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            bounds = self.quant_min, self.quant_max
            choose = torch.ops.quantized_decomposed.choose_qparams.tensor
            scale, zero_point = choose(wide.detach(), *bounds, self.eps, self.dtype)
            rounded = torch.fake_quantize_per_tensor_affine(
                wide, scale.float().squeeze(), zero_point.int().squeeze(), *bounds
            )
        return rounded.to(x.dtype)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Not known before run time."""
        raise NotImplementedError


def _drop_flags(module: nn.Module) -> None:
    """torchao keeps its switches as buffers."""
    for name in _FLAGS:
        module._buffers.pop(name, None)
