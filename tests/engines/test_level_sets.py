"""Registered sets of levels in training and at convert: values by hand, gradients, integers that ship."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from registered_levels import FP4, POWERS, SCHEMES
from torch import Tensor, nn

import qaware
from qaware.engines.base import packed_bytes
from qaware.engines.fake_quant import set_softness
from qaware.engines.learned import LearnedGrid
from qaware.engines.level_sets import fake_quantize_to, quantize_to
from qaware.engines.levels import shrink, soften
from qaware.engines.modules import ModulesEngine, integers_of
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.exporters.packed import PackedWeight, pack
from qaware.recipe import Recipe
from qaware.scheme import Scheme

each = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.levels)
ONE = torch.ones(1, 1)


def rows(count: int = 6, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def nearest(x: Tensor, levels: tuple[int, ...]) -> Tensor:
    """By looking at every level; the smaller one of two that are as near."""
    points = torch.tensor(levels, dtype=torch.float32)
    return points[(x.unsqueeze(-1) - points).abs().argmin(-1)]


def test_levels_by_hand() -> None:
    x = torch.tensor([[-99.0, -10.1, -10.0, -0.5, -0.4, 0.5, 0.6, 5.0, 5.1, 7.0, 9.9, 99.0]])
    wanted = [-12.0, -12.0, -12.0, -1.0, 0.0, 0.0, 1.0, 4.0, 6.0, 6.0, 8.0, 12.0]
    assert fake_quantize_to(x, ONE, FP4).tolist() == [wanted]
    assert quantize_to(x, ONE, FP4).tolist() == [[int(value) for value in wanted]]
    assert fake_quantize_to(x, 2 * ONE, POWERS).tolist()[0] == [-16, -8, -8, 0, 0, 0, 0, 4, 4, 8, 8, 8]
    assert fake_quantize_to(x, -ONE, POWERS).tolist()[0][:2] == [-4, -4]


@pytest.mark.parametrize("levels", [FP4, POWERS, (-127, -3, 2, 126), tuple(range(-127, 128))])
def test_the_nearest_level_is_found_anywhere(levels: tuple[int, ...]) -> None:
    x = torch.cat([torch.arange(-300, 300) / 2, 60 * rows(4).flatten()]).unsqueeze(0)
    assert torch.equal(fake_quantize_to(x, ONE, levels), nearest(x, levels))


def test_infinity_is_clipped_and_nan_is_seen() -> None:
    found = fake_quantize_to(torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]]), ONE, FP4)
    assert found[0, :2].tolist() == [12, -12]
    assert found[0].isnan().tolist() == [False, False, True, False]


def test_gradients_are_those_of_learned_step_sizes() -> None:
    x = torch.tensor([[-99.0, -0.4, 5.2, 9.0]], requires_grad=True)
    scale = torch.full((1, 1), 2.0, requires_grad=True)
    fake_quantize_to(x, scale, FP4).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0]]
    # The level where it is clipped, else what is left to the level: 0 + 0.2, 3 - 2.6, 4 - 4.5.
    torch.testing.assert_close(float(scale.grad), -12 + 0.2 + 0.4 - 0.5)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_what_ships_is_what_training_saw(scheme: Scheme, dtype: torch.dtype, scale_dtype: str) -> None:
    scheme = dataclasses.replace(scheme, scale_dtype=scale_dtype)
    for seed in range(8):
        weight = rows(seed=seed).to(dtype)
        quantizer = WeightFakeQuantizer(scheme)
        seen = quantizer(weight)
        shipped = integers_of(weight, quantizer, scheme)
        assert torch.equal(shipped.dequantize().to(dtype), seen)
        assert set(shipped.data.unique().tolist()) <= set(scheme.level_set or ())


@each
def test_a_value_on_a_level_stays_there(scheme: Scheme) -> None:
    """As PTQ needs it, which writes the values into the layer and lets them be rounded again."""
    for seed in range(4):
        quantizer = WeightFakeQuantizer(scheme)
        once = quantizer(rows(seed=seed))
        quantizer.fixed = quantizer.scale, quantizer.zero_point
        assert torch.equal(quantizer(once), once)


@each
def test_the_outermost_levels_are_on_the_outermost_values(scheme: Scheme) -> None:
    quantizer = WeightFakeQuantizer(dataclasses.replace(scheme, scale_dtype="float32"))
    weight = rows()
    scale, _ = quantizer.chosen(weight)
    steps = weight.view(*scale.shape, -1) / scale.unsqueeze(-1)
    low, high = scheme.range
    reach = torch.maximum(steps.amax(-1) / high, steps.amin(-1) / low)
    torch.testing.assert_close(reach, torch.ones_like(reach))


@each
def test_rows_of_zeros_are_finite(scheme: Scheme) -> None:
    weight = rows()
    weight[2] = 0
    quantizer = WeightFakeQuantizer(scheme)
    assert bool(quantizer(weight).isfinite().all())
    assert not integers_of(weight, quantizer, scheme).data[2].any()


@each
def test_one_scale_for_the_whole_weight_of_a_static_layer(scheme: Scheme) -> None:
    static = dataclasses.replace(scheme, group_size=0, activation="int8-static", per_tensor=True)
    quantizer = WeightFakeQuantizer(static, narrow=True)
    assert quantizer.integers == scheme.range, "narrow ranges are of integers that have a -128"
    seen = quantizer(rows())
    assert len(quantizer.scale.unique()) == 1
    assert torch.equal(integers_of(rows(), quantizer, static).dequantize(), seen)


@each
@pytest.mark.parametrize("learning", ["lsq", "range"])
def test_learned_scales_begin_better_and_are_trained(scheme: Scheme, learning: str) -> None:
    quantizer = WeightFakeQuantizer(scheme)
    weight = rows(8, 64)
    before = float((quantizer(weight) - weight).square().sum())
    quantizer.learned = LearnedGrid(quantizer, (8, 2), learning)
    error = (quantizer(weight) - weight).square().sum()
    assert float(error) < before
    error.backward()
    assert bool(quantizer.learned.gain.grad.ne(0).all())
    seen = quantizer(weight).detach()
    assert torch.equal(integers_of(weight, quantizer, scheme).dequantize(), seen)


@each
def test_planes_hold_the_integers(scheme: Scheme) -> None:
    weight, quantizer = rows(8, 64), WeightFakeQuantizer(scheme)
    quantizer(weight)
    shipped = integers_of(weight, quantizer, scheme)
    stored = PackedWeight(shipped)
    assert torch.equal(stored.integers(), shipped.data)
    assert torch.equal(stored.dequantize(), shipped.dequantize())
    assert sum(p.numel() for p in pack(shipped.data, scheme).values()) == 8 * 64 * scheme.code_bits // 8
    assert packed_bytes(shipped) == 8 * 64 * scheme.bits // 8 + 8 * 2 * 2


def test_soft_rounding_goes_by_the_gap_that_a_weight_is_in() -> None:
    """Half soft: within a quarter of a gap a weight is on its level, beyond it moves twice as fast; the gaps
    are 1 below 4, 2 above, 4 from 8 to 12, and nothing is beyond 12."""
    x = torch.tensor([[4.5, 4.75, 5.0, 3.8, 3.6, 8.9, 9.5, 10.0, 12.4, 50.0, -8.9, -9.5]])
    hard = fake_quantize_to(x, ONE, FP4)
    found = soften(x, hard, ONE, torch.tensor(0.5), FP4)
    wanted = [[4.0, 4.5, 5.0, 4.0, 3.7, 8.0, 9.0, 10.0, 12.0, 12.0, -8.0, -9.0]]
    torch.testing.assert_close(found, torch.tensor(wanted))
    torch.testing.assert_close(soften(x, hard, ONE, torch.tensor(1.0), FP4)[0, :8], x[0, :8])


@each
def test_soft_rounding_ends(scheme: Scheme) -> None:
    model = nn.Sequential(WeightFakeQuantizer(scheme))
    hard = model(rows())
    set_softness(model, 0.5)
    assert not torch.equal(model(rows()), hard)
    set_softness(model, 1e-6)
    torch.testing.assert_close(model(rows()), hard)
    set_softness(model, 0.0)
    assert torch.equal(model(rows()), hard)


@each
def test_shrinking_finds_a_better_scale(scheme: Scheme) -> None:
    weight, quantizer = rows(64, 128), WeightFakeQuantizer(scheme)
    scale, zero = quantizer.chosen(weight)
    ours = float((quantizer(weight) - weight).square().sum())
    quantizer.fixed = shrink(weight, scale, zero, scheme, quantizer.integers), zero
    assert float((quantizer(weight) - weight).square().sum()) < ours


@each
def test_adapters_are_trained_inside_the_levels(scheme: Scheme) -> None:
    """Low-rank gradients take a short way, which is that of evenly spaced levels."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 8)), config)
    plan = Recipe.from_dict({"rules": [{"type": "Linear", "scheme": scheme.to_dict()}]}).match(model)
    ModulesEngine().prepare(model, plan)
    seen = model(rows())
    seen.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    converted = ModulesEngine().convert(model, plan)
    assert torch.equal(converted.module(rows()), seen)


def test_the_graph_engine_says_that_it_has_all_levels_only() -> None:
    qaware.register_levels("test-wide", tuple(range(-127, 127, 1)))
    scheme = {"bits": 8, "activation": "int8-static", "levels": "test-wide"}
    recipe = {"rules": [{"type": "Linear", "scheme": scheme}]}
    model, batch = nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)]
    with pytest.raises(qaware.QawareError, match=r"int8 kernels only; use bits: 8 without .*levels"):
        qaware.quantize(model, recipe, calibration=batch, engine="graph", runtimes=["executorch"])
