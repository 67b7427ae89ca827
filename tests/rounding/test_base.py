"""Writing what was chosen: rounding the written weight to nearest gives the chosen integers again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convnets import images, laid_out, prepared, residual
from rounded import SCHEMES, name_of, net, prepare, recipe, weights
from torch import nn

from qaware.rounding import mse
from qaware.rounding.base import Chosen, fix, shipped_weight, write_rows
from qaware.rounding.grid import Grid
from qaware.roundings import Mse

WHOLE = slice(None)
PLAIN = [s for s in SCHEMES if not s.get("activation")]


def written(layer: Any, chosen: Chosen) -> None:
    write_rows(layer, WHOLE, chosen.weight)
    fix(layer, chosen.scale, chosen.zero_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", PLAIN, ids=name_of)
def test_a_written_layer_computes_what_was_chosen(scheme: dict[str, Any], dtype: torch.dtype) -> None:
    layer: Any = nn.Linear(64, 12, bias=False).to(dtype)
    layer.weight.data.copy_(weights() / 4)
    model = nn.Sequential(layer)
    prepare(model, recipe("mse", scheme))
    chosen = mse.choose(shipped_weight(layer), Grid(layer.weight_fake_quantizer), Mse(), None)
    written(layer, chosen)
    layer.weight_fake_quantizer(layer.weight)
    integers, scale = layer.weight_fake_quantizer.to_integers(layer.weight)
    size = 64 // scale.shape[1]
    if chosen.zero_point.any():
        integers = integers - chosen.zero_point.repeat_interleave(size, 1)
    expected = chosen.weight / scale.repeat_interleave(size, 1)
    torch.testing.assert_close(integers.float(), expected, atol=0.01, rtol=0)


def test_a_folded_batch_norm_is_taken_out_again() -> None:
    model = residual()
    model.stem[1].weight.data[3] = 0  # a channel that is switched off
    x = images()
    made: Any = prepared(model, laid_out(model, x), x)
    layer = made.stem[0]
    before = layer.weight.clone()
    chosen = mse.choose(shipped_weight(layer), Grid(layer.weight_fake_quantizer), Mse(), None)
    written(layer, chosen)
    torch.testing.assert_close(shipped_weight(layer), chosen.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        layer.rounded(layer.folded()[0]).flatten(1), chosen.weight, atol=1e-6, rtol=1e-5
    )
    assert torch.equal(layer.weight[3], before[3])


def test_ties_survive() -> None:
    model = net(tie=True)
    prepare(model, recipe("mse"))
    chosen = mse.choose(shipped_weight(model.head), Grid(model.head.weight_fake_quantizer), Mse(), None)
    written(model.head, chosen)
    assert model.head.weight is model.embed.weight
