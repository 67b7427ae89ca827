"""Moments are those of the rows that a layer multiplies its weight with."""

from __future__ import annotations

import pytest
import torch
from rounded import generator, inputs, seen
from torch import nn

from qaware.errors import QawareError
from qaware.rounding.moments import Moments, patches


def test_means_over_batches() -> None:
    x = inputs(40, 16)
    moments = seen(nn.Linear(16, 3), x[:10].view(2, 5, 16), x[10:])
    torch.testing.assert_close(moments.mean[0], x.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments.hessian[0], x.T @ x / 40, atol=1e-3, rtol=1e-4)
    assert float(moments.count) == 40


def test_drift_is_what_the_float_model_has_more() -> None:
    x, exact = inputs(40, 16), inputs(40, 16, seed=2)
    moments = Moments(nn.Linear(16, 3), beside=True)
    moments.look(x[:20], exact[:20])
    moments.look(x[20:])  # nothing was seen there
    moments.reduce("layer")
    assert moments.drift is not None
    wanted = (exact - x)[:20].T @ x[:20] / 40
    torch.testing.assert_close(moments.drift[0], wanted, atol=1e-3, rtol=1e-4)
    entered = torch.cat([exact[:20], x[20:]]).mean(0)
    torch.testing.assert_close(moments.exact_mean[0], entered, atol=1e-5, rtol=1e-4)


LAYERS = [
    (nn.Conv1d(6, 4, 3, padding=1, stride=2), (2, 6, 9)),
    (nn.Conv1d(6, 4, 3, padding="same", padding_mode="circular", groups=2), (2, 6, 9)),
    (nn.Conv2d(6, 8, 3, padding=1, dilation=2, groups=2), (2, 6, 8, 7)),
    (nn.Conv2d(6, 6, (1, 3), padding=(0, 1), groups=6), (2, 6, 5, 5)),
    (nn.Conv2d(6, 4, 1, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
    (nn.Conv2d(6, 4, 3), (6, 5, 5)),
    (nn.Linear(6, 4), (2, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_patches_times_the_weight_are_the_output(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator(0))
    rows = patches(layer, x)
    weight = layer.weight.flatten(1).view(len(rows), -1, rows.shape[-1])
    found = (rows @ weight.transpose(1, 2)).permute(1, 0, 2).flatten(1) + layer.bias
    channels = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
    outputs = layer(x).movedim(channels, -1).flatten(0, -2)
    torch.testing.assert_close(found, outputs, atol=1e-5, rtol=1e-4)


def test_broken_input_names_the_layer() -> None:
    moments = Moments(nn.Linear(4, 2))
    moments.look(torch.tensor([[1.0, float("nan"), 0, 0]]))
    with pytest.raises(QawareError, match=r"blocks\.3\.up: calibration gave NaN"):
        moments.reduce("blocks.3.up")


def test_nothing_seen() -> None:
    moments = Moments(nn.Linear(4, 2))
    assert not moments.seen
    assert not bool(moments.hessian.any())
