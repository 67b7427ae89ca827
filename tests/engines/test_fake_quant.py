"""Fake-quantizers: values by hand, gradients, and the switch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qaware.engines.fake_quant import (
    Float16FakeQuantizer,
    StaticFakeQuantizer,
    TokenFakeQuantizer,
    activation_fake_quantizer,
    integer_dtype,
    set_fake_quant,
    weight_fake_quantizer,
)
from qaware.errors import QawareError
from qaware.scheme import SCALE_DTYPES, Scheme


def observed(low: float, high: float) -> StaticFakeQuantizer:
    quantizer = StaticFakeQuantizer()
    quantizer.observer.observing = True
    quantizer(torch.tensor([low, high]))
    quantizer.observer.observing = False
    return quantizer


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


def test_every_token_has_its_own_range() -> None:
    x = torch.stack([rows(1)[0], rows(1, seed=1)[0] * 1000])
    y = TokenFakeQuantizer()(x)
    step = (x.amax(1) - x.amin(1)) / 255
    assert bool(((y - x).abs() <= step[:, None] * 0.51).all())
    assert torch.equal(TokenFakeQuantizer()(x[:1]), y[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_is_rounded_as_the_integer_layer_rounds_it(dtype: torch.dtype) -> None:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    identity = IntxUnpackedToInt8Tensor(
        torch.eye(64, dtype=torch.int8),
        torch.ones(64, 1),
        torch.zeros(64, 1, dtype=torch.int8),
        torch.int8,
        (1, 64),
        dtype,
        "int8_asym_per_token",
    )
    for seed in range(20):
        x = (rows(seed=seed) * 10.0 ** (seed % 5 - 2)).to(dtype)
        y = TokenFakeQuantizer()(x)
        assert y.dtype == dtype
        assert torch.equal(y, nn.functional.linear(x, identity))


def test_tokens_pass_gradients_and_mixed_dtypes_one_after_the_other() -> None:
    quantizer = TokenFakeQuantizer()
    x = rows().requires_grad_()
    quantizer(x).sum().backward()
    inside = (x > x.amin(1, keepdim=True)) & (x < x.amax(1, keepdim=True))  # the ends may be cut off
    torch.testing.assert_close(x.grad[inside], torch.ones_like(x)[inside])
    assert torch.equal(quantizer(rows().bfloat16()), TokenFakeQuantizer()(rows().bfloat16()))
    assert torch.equal(quantizer(rows()), TokenFakeQuantizer()(rows()))


def test_a_static_range_by_hand() -> None:
    quantizer = observed(-1.0, 1.55)
    scale, zero = quantizer.qparams()
    assert float(scale) == pytest.approx(0.01)
    assert int(zero) == -28
    x = torch.tensor([-5.0, -1.0, -0.004, 0.0, 0.006, 1.55, 9.0])
    expected = torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.01, 1.55, 1.55])
    torch.testing.assert_close(quantizer(x), expected)


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (-2.0, -1.0)])
def test_zero_stays_exact_when_it_was_not_observed(low: float, high: float) -> None:
    assert float(observed(low, high)(torch.zeros(1))) == 0


def test_a_static_range_stops_the_gradient_outside() -> None:
    x = torch.tensor([-5.0, 0.5, 5.0], requires_grad=True)
    observed(-1.0, 1.0)(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 0]


def test_before_anything_was_observed_it_is_the_identity_and_has_no_range() -> None:
    quantizer, x = StaticFakeQuantizer(), rows()
    assert torch.equal(quantizer(x), x)
    with pytest.raises(QawareError, match="calibrate"):
        quantizer.qparams()


def test_a_static_range_keeps_the_dtype() -> None:
    quantizer = observed(-1.0, 1.0)
    assert quantizer(rows().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(rows()), quantizer(rows().clone()))


def test_each_activation_has_its_quantizer() -> None:
    assert activation_fake_quantizer(Scheme(8)) is None
    assert isinstance(activation_fake_quantizer(Scheme(8, activation="int8-dynamic")), TokenFakeQuantizer)
    assert isinstance(activation_fake_quantizer(Scheme(8, activation="int8-static")), StaticFakeQuantizer)


def test_integer_dtype() -> None:
    assert [integer_dtype(Scheme(b)) for b in (1, 4, 8)] == [torch.int1, torch.int4, torch.int8]


def test_the_switch_reaches_every_kind_and_keeps_observing() -> None:
    model = nn.ModuleList(
        [
            weight_fake_quantizer(Scheme(2)),
            weight_fake_quantizer(Scheme(16)),
            TokenFakeQuantizer(),
            observed(-1, 1),
        ]
    )
    x = rows()
    set_fake_quant(model, False)
    assert all(torch.equal(quantizer(x), x) for quantizer in model)
    model[3].observer.observing = True
    model[3](x)
    assert float(model[3].observer.max_val) == float(x.max())
    set_fake_quant(model, True)
    assert not any(torch.equal(quantizer(x), x) for quantizer in model)
