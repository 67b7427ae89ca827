from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from convnets import images, settle
from torch import Tensor, nn

from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.static_layers import FakeQuantizedLayer, prepare_layer
from qaware.layout import LayerSite
from qaware.observers import observers
from qaware.scheme import Scheme

STATIC = Scheme(8, activation="int8-static")


class Pair(nn.Module):
    """A layer and its batch norm, prepared together."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None, scheme: Scheme = STATIC) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm
        site = LayerSite("layer", None if norm is None else "norm")
        prepare_layer(layer, type(layer).__name__, scheme, site, norm)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if self.norm is None else self.norm(y)


KINDS = {
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, 2, 1, groups=3), lambda: nn.BatchNorm2d(6), (4, 3, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, bias=False), lambda: nn.BatchNorm1d(6), (4, 3, 8)),
    "linear": (lambda: nn.Linear(3, 6), lambda: nn.BatchNorm1d(6, affine=False), (4, 3)),
}


def pair(kind: str, **scheme: Any) -> tuple[nn.Sequential, Pair, Tensor]:
    torch.manual_seed(0)
    layer, norm, shape = KINDS[kind]
    plain = settle(nn.Sequential(layer(), norm()))
    copied = copy.deepcopy(plain)
    made = Pair(copied[0], copied[1], Scheme(**{"bits": 8, "activation": "int8-static", **scheme}))
    return plain, made, torch.randn(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_without_rounding_it_is_the_float_layer_and_its_norm(kind: str, training: bool) -> None:
    plain, made, x = pair(kind)
    set_fake_quant(made, False)
    plain.train(training)
    made.train(training)
    assert torch.equal(made(x), plain(x))
    for name, buffer in plain[1].named_buffers():
        assert torch.equal(buffer, dict(made.norm.named_buffers())[name])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weight_and_bias_compute_what_layer_and_norm_do(kind: str) -> None:
    plain, made, x = pair(kind)
    layer: Any = made.layer
    torch.testing.assert_close(layer.product(x, *layer.folded()), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_rounds_the_weight_that_ships_and_moves_the_statistics(kind: str) -> None:
    plain, made, x = pair(kind)
    plain.train()
    made.train()
    before = made.norm.running_mean.clone()  # type: ignore[union-attr,operator]
    y = made(x)  # no range yet, so only the weight is rounded
    layer: Any = made.layer
    torch.testing.assert_close(y, plain(x), rtol=0, atol=0.1)
    assert not torch.equal(y, plain(x))
    assert not torch.equal(before, made.norm.running_mean)  # type: ignore[union-attr,arg-type]
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    assert layer.weight.grad.abs().sum() > 0


def test_frozen_statistics_train_on_the_folded_weight() -> None:
    _, made, x = pair("conv2d")
    made.train()
    made.norm.eval()  # type: ignore[union-attr]
    layer: Any = made.layer
    weight, bias = layer.folded()
    assert torch.equal(made(x), layer.product(x, layer.rounded(weight), bias))


def test_a_channel_that_is_switched_off_trains() -> None:
    _, made, x = pair("conv2d")
    norm: Any = made.norm
    with torch.no_grad():
        norm.weight.zero_()
    made.train()
    y = made(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_take_the_range_of_integer_kernels(per_tensor: bool, symmetric: bool) -> None:
    _, made, _ = pair("conv2d", per_tensor=per_tensor, symmetric=symmetric)
    layer: Any = made.layer
    weight = torch.randn(6, 9)
    rounded = layer.weight_fake_quantizer(weight)
    scale, zero_point = layer.weight_fake_quantizer.scale, layer.weight_fake_quantizer.zero_point
    assert scale.shape == (6, 1)
    assert len(scale.unique()) == (1 if per_tensor else 6)
    integers = (rounded / scale + zero_point).round()
    assert integers.max() == 127
    assert integers.min() >= (-127 if symmetric else -128)
    assert bool((zero_point == 0).all()) == symmetric


def test_observers_see_the_input_and_what_leaves_after_the_relu() -> None:
    x = images(4)
    layer: Any = nn.Conv2d(3, 4, 1)
    prepare_layer(layer, "Conv2d", STATIC, LayerSite("", relu=True), None)
    for observer in observers(layer):
        observer.observing = True
    assert isinstance(layer, FakeQuantizedLayer)
    layer(x)
    assert float(layer.activation_fake_quantizer.observer.max_val) == float(x.max())
    assert float(layer.output_fake_quantizer.observer.min_val) == 0.0
    inner: Any = nn.Conv2d(3, 4, 1)
    prepare_layer(inner, "Conv2d", STATIC, LayerSite("", source="before"), None)
    assert inner.activation_fake_quantizer is None
