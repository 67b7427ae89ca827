"""Gradients of low-rank factors: those of the dense product, and no tensor as large as the weight is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qaware.engines.low_rank import Factors, pass_to_factors

ROWS, WIDTH, RANK = 40, 48, 3


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(count: int, dtype: torch.dtype = torch.float32) -> list[Factors]:
    return [
        Factors(
            some(RANK, WIDTH, seed=2 * i, dtype=dtype).requires_grad_(),
            some(ROWS, RANK, seed=2 * i + 1, dtype=dtype).requires_grad_(),
            0.5 + i,
        )
        for i in range(count)
    ]


def places(share: float) -> Tensor:
    return (torch.rand(ROWS * WIDTH, generator=torch.Generator().manual_seed(7)) < share).nonzero().squeeze(1)


def gradients(y: Tensor, x: Tensor, factors: list[Factors]) -> list[Tensor]:
    inputs = [x, *(tensor for factor in factors for tensor in (factor.a, factor.b))]
    return list(torch.autograd.grad((y.float() ** 2).sum(), inputs))


def dense(x: Tensor, weight: Tensor, clipped: Tensor, factors: list[Factors]) -> list[Tensor]:
    """Autograd through a weight that is the same and gets the gradient of what is not clipped."""
    kept = torch.ones(ROWS * WIDTH).index_fill_(0, clipped, 0).view(ROWS, WIDTH)
    delta = sum((f.b @ f.a * f.scale for f in factors), torch.zeros(())).float()
    passed = (delta - delta.detach()) * kept
    return gradients(F.linear(x, weight + passed.to(weight.dtype)), x, factors)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(9, WIDTH), (2, 5, WIDTH), (WIDTH,)])
def test_they_are_those_of_the_dense_product(share: float, shape: tuple[int, ...]) -> None:
    x, weight, factors = some(*shape, seed=4).requires_grad_(), some(ROWS, WIDTH, seed=5), made(2)
    y = pass_to_factors(F.linear(x, weight), x, places(share), factors)
    for found, expected in zip(
        gradients(y, x, factors), dense(x, weight, places(share), factors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_in_half_precision_as_exact_as_the_dense_product(share: float) -> None:
    dtype = torch.bfloat16
    x, weight = some(9, WIDTH, seed=4), some(ROWS, WIDTH, seed=5)
    exact = dense(x.requires_grad_(), weight, places(share), made(1))
    x, factors = x.detach().to(dtype).requires_grad_(), made(1)
    y = pass_to_factors(F.linear(x, weight.to(dtype)), x, places(share), factors)
    for found, expected in zip(gradients(y, x, factors), exact, strict=True):
        assert float((found.float() - expected).norm() / expected.norm()) < 0.02
    assert factors[0].a.dtype == torch.float32


def test_the_product_is_not_copied_and_may_be_changed_in_place() -> None:
    x, weight, factors = some(9, WIDTH).requires_grad_(), some(ROWS, WIDTH, seed=5), made(1)
    y = F.linear(x, weight)
    before = y.detach().clone()
    passed = pass_to_factors(y, x, places(0.02), factors)
    assert passed.data_ptr() == y.data_ptr()
    assert torch.equal(passed, before)
    passed.relu_()
    found = gradients(passed, x, factors)
    expected = gradients(pass_to_factors(F.linear(x, weight), x, places(0.02), factors).relu(), x, factors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_input_without_a_gradient() -> None:
    x, weight, factors = some(9, WIDTH), some(ROWS, WIDTH, seed=5), made(1)
    y = pass_to_factors(F.linear(x, weight), x, places(0.02), factors)
    (y**2).sum().backward()
    expected = dense(x.clone().requires_grad_(), weight, places(0.02), made(1))
    torch.testing.assert_close(factors[0].a.grad, expected[1], rtol=1e-4, atol=1e-3)


def test_nothing_as_large_as_the_weight_is_kept() -> None:
    kept: list[Tensor] = []
    x, weight, factors = some(2, WIDTH).requires_grad_(), some(ROWS, WIDTH, seed=5), made(1)
    y = F.linear(x, weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pass_to_factors(y, x, places(0.02), factors)
    assert max(tensor.numel() for tensor in kept) < ROWS * WIDTH / 8
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept)
