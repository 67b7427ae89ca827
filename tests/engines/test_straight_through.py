"""Rounding as one step of autograd: the values and gradients of torchao's chain, bit for bit and bound."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torchao.quantization.quant_primitives import MappingType, _fake_quantize_affine, choose_qparams_affine

from qaware.engines.straight_through import round_straight_through

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(seed))
    x[3] = 0
    return (x * 10.0 ** (seed % 4 - 2)).to(dtype)


def grid(
    x: Tensor, block: int, symmetric: bool, integers: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    kind = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    eps = 2.0**-15 if scale_dtype == torch.float16 else None
    scale, zero = choose_qparams_affine(x, kind, (1, block), torch.int8, *integers, eps, scale_dtype)
    # Seven tenths of what fits, so that much is clipped.
    return (scale * 0.7).to(scale_dtype).view(len(x), -1), zero.view(len(x), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("integers", [(-8, 7), (-128, 127), (-2, 1), (-127, 127)])
def test_values_are_those_of_torchao_and_so_is_what_is_clipped(
    dtype: torch.dtype, scale_dtype: torch.dtype, symmetric: bool, integers: tuple[int, int]
) -> None:
    for seed in range(4):
        block = (16, 64)[seed % 2]
        theirs, ours = (rows(seed, dtype).requires_grad_() for _ in range(2))
        scale, zero = grid(ours.detach(), block, symmetric, integers, scale_dtype)
        expected = _fake_quantize_affine(theirs, (1, block), scale, zero, torch.int32, *integers)
        found = round_straight_through(ours, scale, None if symmetric else zero, *integers)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        expected.sum().backward()
        found.sum().backward()
        assert theirs.grad is not None
        assert ours.grad is not None
        alive = torch.arange(12) != 3  # on a row of zeros the factors of the chain underflow
        assert torch.equal(ours.grad[alive] == 0, theirs.grad[alive] == 0)
        assert bool((ours.grad == 0).any())
        # Ours is 1; the chain's is the scale times its reciprocal, in the precision of both.
        assert set(ours.grad.unique().tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(ours.grad[alive], theirs.grad[alive], rtol=1e-2, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_scale_is_pytorchs_fake_quantize(layout: torch.memory_format) -> None:
    for seed in range(10):
        x = rows(seed).view(2, 6, 8, 8).contiguous(memory_format=layout)
        scale = (x.max() - x.min()) / 255 * (0.7 if seed % 3 else 1.0)
        zero = (-128 - (x.min() / scale).round()).clamp(-128, 127).to(torch.int32)
        theirs, ours = (x.clone().requires_grad_() for _ in range(2))
        expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero, -128, 127)
        found = round_straight_through(ours, scale, zero, -128, 127)
        assert torch.equal(found, expected)
        assert found.stride() == x.stride()
        grad = torch.randn_like(x)
        expected.backward(grad)
        found.backward(grad)
        assert torch.equal(ours.grad, theirs.grad)


def test_the_argument_stays_and_the_result_may_be_changed_in_place() -> None:
    for scale in (torch.full((12, 4), 0.1), torch.tensor(0.1)):
        x = rows(2).requires_grad_()
        before = copy.deepcopy(x.detach())
        found = round_straight_through(x, scale, None, -8, 7)
        found.relu_()
        assert torch.equal(x.detach(), before)
        found.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad != 0, (found > 0) & (x < 0.75))


def test_without_gradients_nothing_is_kept() -> None:
    x = rows(2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = round_straight_through(x, torch.full((12, 4), 0.1), None, -8, 7)
        assert not kept
        again = round_straight_through(x.requires_grad_(), torch.full((12, 4), 0.1), None, -8, 7)
    assert torch.equal(found, again)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.float16, x.numel())]


def test_gradients_of_gradients_are_those_of_the_chain() -> None:
    found = []
    scale, zero = torch.full((12, 4), 0.1), torch.zeros(12, 4, dtype=torch.int32)
    for rounds in (
        lambda x: round_straight_through(x, scale, zero, -8, 7),
        lambda x: round_straight_through(x, torch.tensor(0.1), torch.tensor(0), -8, 7),
        lambda x: _fake_quantize_affine(x, (1, 16), scale, zero, torch.int32, -8, 7),
    ):
        x = rows(2).requires_grad_()
        (first,) = torch.autograd.grad(rounds(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.sum(), x)[0])
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])
    assert bool(found[2].any())


def test_the_chain_is_traced_for_export() -> None:
    class Rounded(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return round_straight_through(x, torch.full((12, 4), 0.1), None, -8, 7)

    program = torch.export.export(Rounded(), (rows(2),))
    assert torch.equal(program.module()(rows(2)), Rounded()(rows(2)))
