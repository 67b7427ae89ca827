"""Activations as integers of each token."""

from __future__ import annotations

import torch

from qaware.engines.base import ActivationRange
from qaware.exporters.aoti_tokens import integers, two_digits
from qaware.exporters.packed_layers import round_per_token


def test_two_digits_are_the_sixteen_bits() -> None:
    for seed in range(20):
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed / 4 - 2)
        digits, scale = two_digits(x)
        values = (digits[0].double() * 256 + digits[1]) * scale.double().unsqueeze(1)
        assert ((values - x).abs().amax(1) <= scale * 0.501).all()
        assert torch.equal(scale, x.abs().amax(1) / 32639)
    digits, scale = two_digits(torch.zeros(2, 8))
    assert not digits.any()
    assert (scale > 0).all()


def test_the_largest_value_of_a_token_has_no_digit_too_many() -> None:
    digits, _ = two_digits(torch.tensor([[1.0, -1.0, 0.0]]))
    assert digits[:, 0].tolist() == [[127, -127, 0], [127, -127, 0]]


def test_dynamic_integers_are_what_the_converted_layer_rounds_to() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    values, scale, zero = integers(x, "int8-dynamic", None)
    assert zero is not None
    assert torch.equal((values[0] - zero.unsqueeze(1)) * scale.unsqueeze(1), round_per_token(x))


def test_static_integers_are_those_of_the_range() -> None:
    x = torch.tensor([[-9.0, 0.0, 0.26, 99.0]])
    values, scale, zero = integers(x, "int8-static", ActivationRange(0.1, 3))
    assert values.tolist() == [[[-87, 3, 6, 127]]]
    assert torch.equal(scale, torch.tensor([0.1]))
    assert zero is not None
    assert zero.tolist() == [3]
