"""Fake-quantizers of activations: values by hand and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qaware.engines.activation_fake_quant import (
    StaticFakeQuantizer,
    TokenFakeQuantizer,
    activation_fake_quantizer,
)
from qaware.engines.straight_through import round_straight_through
from qaware.errors import QawareError
from qaware.scheme import Scheme


def observed(low: float, high: float) -> StaticFakeQuantizer:
    quantizer = StaticFakeQuantizer()
    quantizer.observer.observing = True
    quantizer(torch.tensor([low, high]))
    quantizer.observer.observing = False
    return quantizer


def rows(count: int = 6, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


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


def test_scale_and_zero_point_follow_the_range() -> None:
    quantizer = observed(-1.0, 1.55)
    scale, zero = quantizer.qparams()
    assert quantizer.qparams()[0] is scale  # a range that stays is looked at once
    for low, high in ((-2.0, 1.55), (-2.0, 3.1), (-1.0, 1.55)):  # as averaging does, past the observer
        quantizer.observer.min_val.fill_(low)
        quantizer.observer.max_val.fill_(high)
        for found, expected in zip(quantizer.qparams(), observed(low, high).qparams(), strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(quantizer.qparams()[1], zero)


def test_a_scale_of_inference_mode_is_not_trained_with() -> None:
    quantizer = observed(-1.0, 1.0)
    with torch.inference_mode():
        quantizer(rows())
    scale, zero = quantizer.qparams()
    assert not scale.is_inference()
    assert not zero.is_inference()
    assert not copy.deepcopy(quantizer).qparams()[0].is_inference()


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


@pytest.mark.parametrize("observer", ["minmax", "moving-average", "histogram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_relu_in_the_rounding_is_one_before_it(observer: str, dtype: torch.dtype) -> None:
    ours, theirs = StaticFakeQuantizer(observer), StaticFakeQuantizer(observer)
    for quantizer in (ours, theirs):
        quantizer.observer.observing = True
    batches = [rows(seed=seed).to(dtype) * (seed + 1) for seed in range(3)]
    batches += [-batches[0].abs(), batches[1] * torch.inf, batches[0] * torch.nan, batches[0] * 10]
    for batch in batches:
        x, same = (batch.clone().requires_grad_() for _ in range(2))
        found, expected = ours(x, relu=True), theirs(torch.relu(same))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        found.sum().backward()
        expected.sum().backward()
        finite = batch.isfinite()
        assert torch.equal(x.grad[finite], same.grad[finite])
        assert str(ours.observer.state_dict()) == str(theirs.observer.state_dict())
    assert bool((same.grad[batch > 0] == 0).any()) is (observer == "moving-average")  # some is clipped


def test_a_relu_in_the_rounding_with_a_range_that_goes_below_zero() -> None:
    quantizer, x = observed(-1.0, 3.0), rows().requires_grad_()
    assert torch.equal(quantizer(x, relu=True), quantizer(torch.relu(x)))
    assert bool((quantizer(x, relu=True) >= 0).all())


def test_a_static_range_keeps_the_dtype() -> None:
    quantizer = observed(-1.0, 1.0)
    assert quantizer(rows().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(rows()), quantizer(rows().clone()))


def test_each_activation_has_its_quantizer() -> None:
    assert activation_fake_quantizer(Scheme(8)) is None
    assert isinstance(activation_fake_quantizer(Scheme(8, activation="int8-dynamic")), TokenFakeQuantizer)
    assert isinstance(activation_fake_quantizer(Scheme(8, activation="int8-static")), StaticFakeQuantizer)


@pytest.mark.parametrize("observer", ["minmax", "moving-average"])
@pytest.mark.parametrize("observing", [True, False])
def test_what_the_range_was_found_for_needs_no_clipping(observer: str, observing: bool) -> None:
    quantizer = StaticFakeQuantizer(observer)
    quantizer.observer.observing = True
    quantizer(rows())
    quantizer.observer.observing = observing
    x = (3 * rows(seed=1)).requires_grad_()
    y = quantizer(x)
    scale, zero_point = quantizer.qparams()
    plain = round_straight_through(x, scale, zero_point, -128, 127)
    assert torch.equal(y, plain)
    (found,), (wanted,) = (torch.autograd.grad(out.sum(), x) for out in (y, plain))
    assert torch.equal(found, wanted)
    assert bool(found.all()) == (observing and observer == "minmax")
