"""Ternary and stretched levels: values by hand, integers that ship, default scales and soft rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from qaware.engines.base import packed_bytes
from qaware.engines.fake_quant import set_softness
from qaware.engines.levels import shrink, soften
from qaware.engines.modules import integers_of
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.exporters.packed import PackedWeight, pack
from qaware.scheme import Scheme

TERNARY = Scheme(2, 32, levels="ternary", scale_dtype="bfloat16")
STRETCHED = [Scheme(bits, 32, levels="stretched", scale_dtype="bfloat16") for bits in (1, 2, 3)]
LOW = [TERNARY, *STRETCHED]


def rows(count: int = 6, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def fixed(scheme: Scheme, scale: float) -> WeightFakeQuantizer:
    quantizer = WeightFakeQuantizer(scheme)
    quantizer.fixed = torch.tensor([[scale]]), torch.zeros(1, 1, dtype=torch.int32)
    return quantizer


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (Scheme(2, levels="ternary"), [-1, -1, -1, 0, 0, 0, 1, 1, 1]),
        (Scheme(1, levels="stretched"), [-0.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (Scheme(2, levels="stretched"), [-1.5, -1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5, 1.5]),
        (Scheme(3, levels="stretched"), [-3.5, -1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5, 3.5]),
    ],
)
def test_levels_by_hand(scheme: Scheme, expected: list[float]) -> None:
    weight = torch.tensor([[-9.0, -1.9, -1.1, -0.4, 0.1, 0.4, 1.1, 1.9, 9.0]]) * 0.5
    quantizer = fixed(scheme, 0.5)
    assert (quantizer(weight) / 0.5).tolist() == [expected]
    shipped = integers_of(weight, quantizer, scheme)
    assert torch.equal(shipped.dequantize(), quantizer(weight))
    lowest, highest = scheme.range
    assert (int(shipped.data.min()), int(shipped.data.max())) == (lowest, highest)


@pytest.mark.parametrize("scheme", LOW, ids=lambda s: s.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_ships_is_what_training_saw(scheme: Scheme, dtype: torch.dtype) -> None:
    for seed in range(8):
        weight = rows(seed=seed).to(dtype)
        quantizer = WeightFakeQuantizer(scheme)
        seen = quantizer(weight)
        shipped = integers_of(weight, quantizer, scheme)
        assert torch.equal(shipped.dequantize().to(dtype), seen)
        assert seen.dtype == dtype
        if scheme.is_stretched:
            assert bool((shipped.data % 2 != 0).all()), "stretched levels ship as odd integers"


@pytest.mark.parametrize("scheme", LOW, ids=lambda s: s.label)
def test_default_scales_are_near_the_best(scheme: Scheme) -> None:
    """Ternary loses 0.19 of a normal weight's energy, 2 stretched bits 0.12; on the largest value ternary
    would lose 0.4."""
    weight, quantizer = rows(64, 128), WeightFakeQuantizer(scheme)
    scale, zero = quantizer.chosen(weight)
    best = shrink(weight, scale, zero, scheme, quantizer.integers)
    ours = float((quantizer(weight) - weight).square().sum())
    quantizer.fixed = best, zero
    least = float((quantizer(weight) - weight).square().sum())
    assert least <= ours <= 1.25 * least


@pytest.mark.parametrize("scheme", LOW, ids=lambda s: s.label)
def test_rows_of_zeros_are_finite(scheme: Scheme) -> None:
    weight = rows()
    weight[2] = 0
    quantizer = WeightFakeQuantizer(scheme)
    assert bool(quantizer(weight).isfinite().all())
    shipped = integers_of(weight, quantizer, scheme)
    assert float(shipped.dequantize()[2].abs().max()) < 1e-6


def test_the_gradient_of_a_stretched_weight_passes_straight_through() -> None:
    weight = torch.tensor([[-9.0, -0.3, 0.2, 9.0]], requires_grad=True)
    quantizer = fixed(Scheme(2, levels="stretched"), 1.0)
    quantizer(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("scheme", LOW, ids=lambda s: s.label)
def test_planes_hold_the_bits_of_information(scheme: Scheme) -> None:
    weight, quantizer = rows(8, 64), WeightFakeQuantizer(scheme)
    quantizer(weight)
    shipped = integers_of(weight, quantizer, scheme)
    stored = PackedWeight(shipped)
    assert torch.equal(stored.integers(), shipped.data)
    assert torch.equal(stored.dequantize(), shipped.dequantize())
    planes = pack(shipped.data, scheme)
    assert sum(p.numel() for p in planes.values()) == 8 * 64 * scheme.bits // 8
    assert packed_bytes(shipped) == 8 * 64 * scheme.bits // 8 + 8 * 2 * 2


def test_soft_rounding_goes_from_nothing_to_all_of_it() -> None:
    weight = rows().clamp(-1, 1)
    scale = torch.full((6, 1), 0.5)
    hard = (weight / 0.5).round() * 0.5
    left = [
        float((soften(weight, hard, scale, torch.tensor(s)) - hard).abs().sum()) for s in (1, 0.5, 0.1, 1e-4)
    ]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 1e-2 < left[0]
    torch.testing.assert_close(soften(weight, hard, scale, torch.tensor(1.0)), weight)


def test_soft_rounding_by_hand() -> None:
    """Half soft: within a quarter of a step a weight is on its level, beyond it moves twice as fast."""
    weight = torch.tensor([[0.2, 0.25, 0.4, 0.5, 7.0]])
    hard = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]])
    found = soften(weight, hard, torch.ones(1, 1), torch.tensor(0.5))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.3, 0.5, 1.0]]))


def test_softness_is_of_weights_and_ends() -> None:
    model = nn.Sequential(WeightFakeQuantizer(TERNARY))
    weight = rows()
    hard = model(weight)
    set_softness(model, 0.5)
    assert not torch.equal(model(weight), hard)
    set_softness(model, 0.0)
    assert torch.equal(model(weight), hard)


def test_one_scale_for_the_whole_weight() -> None:
    for levels, seed in itertools.product(("ternary", "stretched"), range(3)):
        scheme = Scheme(2, activation="int8-static", per_tensor=True, levels=levels)
        quantizer = WeightFakeQuantizer(scheme, narrow=True)
        seen = quantizer(rows(seed=seed))
        assert len(quantizer.scale.unique()) == 1
        assert torch.equal(integers_of(rows(seed=seed), quantizer, scheme).dequantize(), seen)
