"""Fake-quantizers of activations: a range for each token, by torchao's ``IntxFakeQuantizer`` with a
correction, and a static range that is calibrated by an observer, which torchao has none for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.granularity import PerToken
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    choose_qparams_affine_with_min_max,
)

from qaware.engines.straight_through import is_one_pass, round_inside, round_rectified, round_straight_through
from qaware.errors import QawareError
from qaware.observers import KINDS
from qaware.scheme import Scheme

INT8 = (-128, 127)


class TokenFakeQuantizer(IntxFakeQuantizer):
    """int8 asymmetric fake-quantization of an activation with a range for each token."""

    def __init__(self) -> None:
        super().__init__(IntxFakeQuantizeConfig(torch.int8, PerToken(), is_symmetric=False))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        # The scales of torchao's integer layer have the precision of its input; these must have it too.
        self.config.scale_precision = x.dtype
        rounded: Tensor = super().forward(x)
        return rounded

    def _per_token_forward(self, x: Tensor) -> Tensor:
        # What torchao does, without a check that it imports from the deprecated torch.ao.quantization.
        block = (*(1,) * (x.dim() - 1), x.shape[-1])
        config = self.config
        scale, zero_point = choose_qparams_affine(
            x,
            MappingType.ASYMMETRIC,
            block,
            torch.int8,
            *INT8,
            eps=config.eps,
            scale_dtype=config.scale_precision,
            zero_point_dtype=config.zero_point_precision,
        )
        return round_straight_through(x, scale, zero_point, *INT8)


class StaticFakeQuantizer(nn.Module):
    """int8 asymmetric fake-quantization of an activation with one range, kept by an observer."""

    def __init__(self, observer: str = "minmax") -> None:
        super().__init__()
        self.enabled = True
        self.observer = KINDS[observer]()
        self._last: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Same shape and dtype as ``x``; unchanged until a range was observed. With ``relu`` that of
        ``relu(x)``."""
        if relu and self._is_one_pass(x):
            return self._rectified(x)
        x = torch.relu(x) if relu else x
        self.observer(x)
        if self.observer.covers and self._is_one_pass(x) and self.observer.seen:
            return round_inside(x, *self.qparams(), *INT8)
        return self.rounded(x)

    def _is_one_pass(self, x: Tensor) -> bool:
        # Where nothing trains, somebody may look at what enters the observer.
        trains = self.enabled and torch.is_grad_enabled()
        return trains and is_one_pass(x) and self.observer.passes == 1

    def _rectified(self, x: Tensor) -> Tensor:
        if self.observer.observing and x.numel():
            # All that an observer of one pass looks at.
            self.observer.look_at_ends(*(end.relu() for end in torch.aminmax(x.detach())))
        if not self.observer.seen:
            return torch.relu(x)
        scale, zero_point = self.qparams()
        lowest, highest = INT8
        if int(zero_point) != lowest:  # a range from elsewhere
            return self.rounded(torch.relu(x))
        return round_rectified(x, scale, highest - lowest)

    def rounded(self, x: Tensor) -> Tensor:
        """``forward`` without a look at ``x``."""
        if not self.enabled or not self.observer.seen:
            return x
        scale, zero_point = self.qparams()
        # The product runs in float32, as the converted layer's does, whatever autocast is around it.
        with torch.autocast(x.device.type, enabled=False):
            return round_straight_through(x.float(), scale, zero_point, *INT8).to(x.dtype)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32 scalar) and zero point (int32 scalar) of the observed range.

        Raises:
            QawareError: nothing finite was observed yet.
        """
        if not self.observer.seen:
            raise QawareError(
                "int8-static: no finite activation was observed; "
                "calibrate (PTQ) or train (QAT) before converting"
            )
        low, high = self.observer.range()
        if torch.compiler.is_compiling():
            return _qparams(low, high)
        # A range that has settled is that of the step before: two numbers instead of a dozen small tensors.
        # What was made in inference mode is of no use to autograd.
        ends = float(low), float(high), low.device, torch.is_inference_mode_enabled()
        if self._last is None or self._last[0] != ends:
            self._last = ends, _qparams(low, high)
        return self._last[1]


@torch.no_grad()
def _qparams(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    scale, zero_point = choose_qparams_affine_with_min_max(
        low, high, MappingType.ASYMMETRIC, (), torch.int8, *INT8, zero_point_dtype=torch.int32
    )
    return scale, zero_point


def activation_fake_quantizer(scheme: Scheme) -> nn.Module | None:
    """The fake-quantizer of the activation that enters a layer, or None."""
    if scheme.activation == "int8-dynamic":
        return TokenFakeQuantizer()
    return StaticFakeQuantizer(scheme.observer) if scheme.activation == "int8-static" else None
