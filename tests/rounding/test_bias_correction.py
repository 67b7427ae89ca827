"""The mean of a layer's output is that of the float model again."""

from __future__ import annotations

from typing import Any

import torch
from convnets import images, laid_out, prepared, residual
from rounded import inputs, seen, weights
from torch import nn

from qaware.rounding.base import shipped_weight
from qaware.rounding.bias_correction import correct_bias
from qaware.rounding.moments import Moments


def test_of_a_linear_layer() -> None:
    layer, x = nn.Linear(64, 12), inputs() + 3
    layer.weight.data = weights()
    rounded = layer.weight + 0.1
    before = layer(x).mean(0)
    assert correct_bias(layer, layer.weight, rounded, seen(layer, x)) == ""
    torch.testing.assert_close((x @ rounded.T + layer.bias).mean(0), before, atol=1e-2, rtol=1e-4)


def test_what_the_layers_before_took_is_given_back() -> None:
    layer, exact = nn.Linear(64, 12), inputs() + 3
    moments = Moments(layer, beside=True)
    moments.look(exact - 1, exact)
    moments.reduce("layer")
    before = layer(exact).mean(0)
    correct_bias(layer, layer.weight, layer.weight, moments)
    torch.testing.assert_close(layer(exact - 1).mean(0), before, atol=1e-3, rtol=1e-4)


def test_of_a_grouped_convolution_with_a_batch_norm() -> None:
    model, x = residual(), images()
    made: Any = prepared(model, laid_out(model, x), x)
    for name in ("block1.conv1", "depthwise"):
        layer = made.get_submodule(name)
        entered: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, kept=entered: kept.append(args[0]))
        made(x)
        handle.remove()
        weight, bias = layer.folded()
        before = layer.product(entered[0], weight, bias).mean((0, 2, 3))
        rounded = shipped_weight(layer) + 0.05
        said = correct_bias(layer, shipped_weight(layer), rounded, seen(layer, entered[0]))
        after = layer.product(entered[0], rounded.view_as(weight), layer.folded()[1]).mean((0, 2, 3))
        assert said == ""
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_what_is_not_corrected_says_why() -> None:
    weight = weights()
    plain, bare = nn.Linear(64, 12), nn.Linear(64, 12, bias=False)
    assert correct_bias(plain, weight, weight, Moments(plain)) == "bias not corrected, as no input was seen"
    assert correct_bias(plain, weight, weight, None) == "bias not corrected, as no input was seen"
    assert correct_bias(bare, weight, weight, seen(bare, inputs())) == "no bias to correct"
    assert correct_bias(nn.Embedding(12, 64), weight, weight, None) == ""
