"""Convolutions and linear layers that compute, in training, what integer kernels will.

A batch norm after the layer is folded as in Jacob et al., "Quantization and training of neural networks
for efficient integer-arithmetic-only inference" (CVPR 2018, section 3.2), and Krishnamoorthi, "Quantizing
deep convolutional networks for efficient inference" (2018, arXiv:1806.08342, section 3.2.2): the weight
is rounded as it ships, scaled by the running statistics, while the batch's own statistics normalize.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.activation_fake_quant import StaticFakeQuantizer
from qaware.engines.operations import activate_and_round, note_rectified, unwatched
from qaware.engines.straight_through import pass_through
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.layout import LayerSite
from qaware.scheme import Scheme

_SMALLEST_FACTOR = 1e-12
_LARGEST_BIAS = 2.0**31


class FakeQuantizedLayer(nn.Module):
    """The part that convolutions and linear layers share."""

    weight: Tensor
    bias: Any
    weight_fake_quantizer: Any
    activation_fake_quantizer: StaticFakeQuantizer | None
    """None where the input is on a grid already, or stays float."""
    output_fake_quantizer: StaticFakeQuantizer | None
    relu: bool
    ceiling: float | None
    norm: tuple[Any, ...]
    """The folded batch norm or nothing; in a tuple, which does not register it a second time."""
    source: tuple[StaticFakeQuantizer, ...] = ()
    """The quantizer that what enters has been through, or nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """As of the float layer with its batch norm and ReLU; the product is a float32 one."""
        with unwatched():
            y = self._compute(self._enter(x))
            y = activate_and_round(y, self.relu, self.ceiling, self.output_fake_quantizer).to(x.dtype)
            return note_rectified(y) if self.relu else y

    def _enter(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.activation_fake_quantizer is not None:
            y = self.activation_fake_quantizer(y)
        elif self.source and x.dtype != torch.float32:
            # Half precision between the layers has moved it off its grid.
            y = self.source[0].rounded(y)
        return y

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own operation."""
        raise NotImplementedError

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight, in the layer's shape, and bias (rows,) as they ship but not rounded; float32."""
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        if not self.norm:
            return weight, bias
        norm, factor = self.norm[0], self._factor()
        mean = norm.running_mean.float() if bias is None else norm.running_mean.float() - bias
        shift = -mean * factor
        return self._scaled(weight, factor), shift if norm.bias is None else shift + norm.bias.float()

    def rounded(self, weight: Tensor) -> Tensor:
        """``weight`` on its grid, same shape."""
        rows: Tensor = self.weight_fake_quantizer(weight.flatten(1), unit=self._unit())
        return rows.view(weight.shape)

    def _unit(self) -> Tensor | None:
        """What a learned scale is multiplied by, (rows, 1): with a norm that is folded the weight grows and
        shrinks, by its running statistics, faster than a scale is trained."""
        quantizer = self.weight_fake_quantizer
        if not self.norm or quantizer.learned is None or quantizer.scheme.per_tensor:
            return None
        factor = self._factor().abs()
        return factor.where(factor > _SMALLEST_FACTOR, 1.0).unsqueeze(1)

    def rounded_bias(self, bias: Tensor | None) -> Tensor | None:
        """``bias`` (rows,) in whole units of the products, input scale times weight scale, as integer kernels
        add it. Called after :meth:`rounded`, which finds the weight's scale."""
        quantizer = self.activation_fake_quantizer or (self.source[0] if self.source else None)
        rounding = quantizer is not None and quantizer.enabled and quantizer.observer.seen
        if bias is None or quantizer is None or not rounding or not self.weight_fake_quantizer.enabled:
            return bias
        unit = quantizer.qparams()[0].double() * self.weight_fake_quantizer.scale.detach().flatten().double()
        steps = (bias.detach().double() / unit).round()
        rounded = torch.where(steps.abs() < _LARGEST_BIAS, steps * unit, bias.detach().double())
        return pass_through(bias, rounded.float())

    def _compute(self, x: Tensor) -> Tensor:
        norm = self.norm[0] if self.norm else None
        if norm is not None and not self.weight_fake_quantizer.enabled:
            bias = None if self.bias is None else self.bias.float()
            plain: Tensor = norm.normalize(self.product(x, self.rounded(self.weight.float()), bias)).float()
            return plain
        if norm is not None and norm.training:
            return self._with_batch_statistics(x, norm)
        weight, bias = self.folded()
        weight = self.rounded(weight)
        return self.product(x, weight, self.rounded_bias(bias))

    def _with_batch_statistics(self, x: Tensor, norm: Any) -> Tensor:
        factor = self._factor()
        # A channel that the norm switches off, as a zero-initialized one does, is rounded unscaled.
        factor = factor.where(factor.abs() > _SMALLEST_FACTOR, 1.0)
        weight = self._scaled(self.rounded(self._scaled(self.weight.float(), factor)), 1 / factor)
        y: Tensor = norm.normalize(
            self.product(x, weight, None if self.bias is None else self.bias.float())
        ).float()
        return y

    def _factor(self) -> Tensor:
        """What the running statistics multiply each output channel by."""
        norm = self.norm[0]
        deviation = torch.sqrt(norm.running_var.float() + norm.eps)
        return 1 / deviation if norm.weight is None else norm.weight.float() / deviation

    def _scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        return weight * factor.view(-1, *(1,) * (weight.dim() - 1))


class FakeQuantizedStaticLinear(FakeQuantizedLayer, nn.Linear):
    """A linear layer in training for integer kernels."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(x, weight, bias)


class FakeQuantizedConv1d(FakeQuantizedLayer, nn.Conv1d):
    """A convolution in training for integer kernels."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, in_channels, length) to (batch, out_channels, length)."""
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class FakeQuantizedConv2d(FakeQuantizedLayer, nn.Conv2d):
    """A convolution in training for integer kernels."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class _FoldedNorm(nn.Module):
    """A batch norm that its layer computes; here, where the model calls it, nothing is left to do."""

    running_mean: Any

    def forward(self, input: Tensor) -> Tensor:
        """``input``."""
        return input

    def normalize(self, x: Tensor) -> Tensor:
        """What the batch norm computes; one in half precision takes no float32."""
        dtype = self.running_mean.dtype
        y: Tensor = super().forward(x if dtype == torch.float32 else x.to(dtype))
        return y


class FoldedBatchNorm1d(_FoldedNorm, nn.BatchNorm1d):
    """A batch norm that is folded into the layer before it."""


class FoldedBatchNorm2d(_FoldedNorm, nn.BatchNorm2d):
    """A batch norm that is folded into the layer before it."""


CLASSES: dict[str, type[FakeQuantizedLayer]] = {
    "Linear": FakeQuantizedStaticLinear,
    "Conv1d": FakeQuantizedConv1d,
    "Conv2d": FakeQuantizedConv2d,
}
_NORMS: dict[type, type] = {nn.BatchNorm1d: FoldedBatchNorm1d, nn.BatchNorm2d: FoldedBatchNorm2d}


def prepare_layer(module: Any, kind: str, scheme: Scheme, site: LayerSite | None, norm: Any) -> None:
    """Turn a float layer into a fake-quantized one, in place.

    Args:
        module: a Linear, Conv1d or Conv2d.
        kind: which of them.
        scheme: its weight's, and, where ``site`` is given, its activations'.
        site: None for a layer whose weight alone is rounded.
        norm: the batch norm to fold, or None; changes too.
    """
    module.__class__ = CLASSES[kind]
    device = module.weight.device
    module.weight_fake_quantizer = WeightFakeQuantizer(scheme, narrow=site is not None).to(device)
    own_input = site is not None and site.source is None
    module.activation_fake_quantizer = StaticFakeQuantizer(scheme.observer).to(device) if own_input else None
    module.output_fake_quantizer = None if site is None else StaticFakeQuantizer(scheme.observer).to(device)
    module.relu = site is not None and site.relu
    module.ceiling = None if site is None else site.ceiling
    module.norm = () if norm is None else (norm,)
    if norm is not None:
        norm.__class__ = _NORMS[type(norm)]
    module.train(module.training)
