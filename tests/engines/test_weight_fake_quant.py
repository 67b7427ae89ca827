"""Fake-quantizers of weights: values by hand and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qaware.engines.weight_fake_quant import Float16FakeQuantizer, integer_dtype, weight_fake_quantizer
from qaware.scheme import SCALE_DTYPES, Scheme


def rows(count: int = 6, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_channels_by_hand(bits: int) -> None:
    weight, (low, high) = rows(), Scheme(bits).range
    scale = weight.abs().amax(1, keepdim=True) / ((high - low) / 2)
    # The largest weight of a row lies between two integers, so that a division would round it elsewhere.
    expected = (weight * (1 / scale)).round().clamp(low, high) * scale
    torch.testing.assert_close(weight_fake_quantizer(Scheme(bits))(weight), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_groups_by_hand(bits: int) -> None:
    groups, (low, high) = (rows() + 0.5).view(-1, 16), Scheme(bits).range
    least, most = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = (most - least) / (high - low)
    zero = (low - (least / scale).round()).clamp(low, high)
    expected = ((groups * (1 / scale)).round() + zero).clamp(low, high).sub(zero) * scale
    found = weight_fake_quantizer(Scheme(bits, 16, symmetric=False))(groups.view(6, 64))
    torch.testing.assert_close(found.view(-1, 16), expected)


def test_group_scales_differ_from_channel_scales() -> None:
    weight = rows()
    weight[:, :32] *= 100
    grouped = weight_fake_quantizer(Scheme(4, 32))(weight)
    whole = weight_fake_quantizer(Scheme(4))(weight)
    assert bool(grouped[:, 32:].any())
    assert not bool(whole[:, 32:].any())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_rounded_in_training_already(dtype: str) -> None:
    quantizer = weight_fake_quantizer(Scheme(8, scale_dtype=dtype))
    quantizer(rows())
    assert quantizer.scale.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_one_weight_have_a_scale_each(symmetric: bool) -> None:
    weight = torch.tensor([[0.1], [-20.0], [3.0]])
    quantizer = weight_fake_quantizer(Scheme(4, symmetric=symmetric))
    torch.testing.assert_close(quantizer(weight), weight, rtol=0.1, atol=0)
    assert quantizer.scale.shape == (3, 1)


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_zeros_stays_zero(dtype: str, symmetric: bool, weight_dtype: torch.dtype) -> None:
    # The padding row of an embedding is one.
    quantizer = weight_fake_quantizer(Scheme(4, 32, symmetric=symmetric, scale_dtype=dtype))
    weight = rows().to(weight_dtype)
    weight[1] = 0
    found = quantizer(weight)
    assert not bool(found[1].any())
    assert bool(found.isfinite().all())


def test_small_weights_are_not_blown_up_by_float16_scales() -> None:
    for exponent in range(-12, 1):
        weight = rows() * 10.0**exponent
        error = (weight_fake_quantizer(Scheme(8, scale_dtype="float16"))(weight) - weight).abs().max()
        assert float(error) <= max(float(weight.abs().max()) / 200, 2.0**-16)


def test_asymmetric_integers_use_the_whole_range_and_keep_zero() -> None:
    weight = rows().abs() + 1
    weight[0, 0] = 0
    quantizer = weight_fake_quantizer(Scheme(4, symmetric=False))
    found = quantizer(weight)
    assert bool((quantizer.zero_point == -8).all())
    assert float(found[0, 0]) == 0
    assert float((found - weight).abs().max()) <= float(quantizer.scale.max()) * 0.51


def test_float16_rounds_to_the_nearest_and_passes_gradients() -> None:
    x = torch.cat([rows().flatten() * 10.0**e for e in range(-9, 4)]).requires_grad_()
    y = Float16FakeQuantizer()(x)
    assert torch.equal(y, x.half().float())
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_integer_dtype() -> None:
    assert [integer_dtype(Scheme(b)) for b in (1, 4, 8)] == [torch.int1, torch.int4, torch.int8]
