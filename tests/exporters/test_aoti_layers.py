"""Layers of integer products in eager mode: what they hold, and that they compute as the converted ones."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qaware import Scheme, machine, recipe_names
from qaware.engines.base import QuantizedModel
from qaware.exporters.aoti import AOTIExporter
from qaware.exporters.aoti_layers import BlockedWeight, ProductLinear, use_products
from qaware.exporters.packed import PackedWeight
from qaware.exporters.packed_layers import pack_layers
from qaware.parity import compare

sys.path.insert(0, str(Path(__file__).parent))
from test_packed import convert, one_rule, random_weight
from tiny import quantize, tokens

CLOSE = 1e-3
"""Of a layer's output, relative; a wrong scale, digit or zero point is off by far more."""


def with_products(quantized: QuantizedModel) -> QuantizedModel:
    work = copy.deepcopy(quantized)
    assert use_products(work)
    pack_layers(work)
    return work


def of_kind(module: nn.Module, kind: type) -> dict[str, nn.Module]:
    return {name: part for name, part in module.named_modules() if type(part) is kind}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "width", "group"), [(16, 64, 0), (5, 96, 32), (33, 64, 32)])
def test_integers_come_back_and_values_are_exact(bits: int, rows: int, width: int, group: int) -> None:
    for seed, symmetric in itertools.product(range(3), (True, False)):
        weight = random_weight(
            Scheme(bits, group, symmetric=symmetric, scale_dtype="bfloat16"), rows, width, seed
        )
        stored = BlockedWeight(weight)
        scale, zero = stored.grid()
        assert torch.equal(stored.integers(), weight.data)
        assert torch.equal(scale, weight.scale)
        assert (zero is None) == symmetric
        assert symmetric or torch.equal(zero, weight.zero_point)
        assert torch.equal(stored.dequantize(), weight.dequantize())
        picked = torch.tensor([[rows - 1, 0], [0, 3]])
        assert torch.equal(stored.dequantize(picked), weight.dequantize()[picked])


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", recipe_names())
def test_named_recipes_compute_the_same(name: str, tie: bool) -> None:
    quantized = quantize(name, tie)
    work = copy.deepcopy(quantized)
    use_products(work)
    pack_layers(work)
    tolerance = AOTIExporter().tolerance_for(quantized.plan)
    inputs = [(tokens(length, seed=length),) for length in (1, 2, 33)]
    compare(work.module, quantized.module, inputs).require(name, tolerance)


@pytest.mark.parametrize("activation", ["none", "int8-dynamic", "int8-static"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_scheme_computes_the_same(bits: int, activation: str) -> None:
    for group, symmetric in itertools.product((0, 32), (True, False)):
        scheme = Scheme(bits, group, activation, symmetric, "float16" if group else "float32")
        model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 33)).eval()
        quantized = convert(model, scheme, tokens(9) % 50)
        work = with_products(quantized).module
        assert type(work[1]) is ProductLinear
        assert close(work(tokens(20) % 50), quantized.module(tokens(20) % 50)), scheme


@pytest.mark.parametrize("levels", [(1, "stretched"), (2, "stretched"), (2, "ternary")])
def test_levels_compute_the_same(levels: tuple[int, str]) -> None:
    for activation in ("none", "int8-dynamic"):
        scheme = Scheme(levels[0], 32, activation, levels=levels[1])
        model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 33, bias=False)).eval()
        quantized = convert(model, scheme, tokens(9) % 50)
        work = with_products(quantized).module
        assert close(work(tokens(20) % 50), quantized.module(tokens(20) % 50)), scheme


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().mean() <= CLOSE * expected.std())


def test_tied_layers_share_what_is_stored() -> None:
    module = with_products(quantize("int4-weight-only", tie=True)).module
    assert isinstance(module.embed.packed, BlockedWeight)
    assert module.embed.packed is module.lm_head.packed
    untied = with_products(quantize("int4-weight-only")).module
    assert isinstance(untied.embed.packed, PackedWeight)


def test_what_the_kernel_cannot_compute_stays_packed() -> None:
    """Other widths, rows that end within a byte's columns, and half precision."""
    wide = {"int3": Scheme(3, 32), "int6": Scheme(6)}
    for scheme in wide.values():
        assert not use_products(quantize(one_rule(scheme)))
    narrow = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 8)).eval()
    assert not use_products(convert(narrow, Scheme(4), tokens(9) % 20))
    half = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 8)).bfloat16().eval()
    assert not use_products(convert(half, Scheme(4, 32), tokens(9) % 20))


def test_hooks_and_axes_survive() -> None:
    quantized = convert(
        nn.Sequential(nn.Linear(64, 8)).eval().requires_grad_(False), Scheme(8), torch.ones(2, 64)
    )
    quantized.module[0].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(2, 3, 5, 64)
    assert close(with_products(quantized).module(x), quantized.module(x))


def test_without_the_instructions_products_are_float_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = quantize("int4-weight-only").plan
    monkeypatch.setattr(machine, "cpu", lambda: {"features": ["avx2", "avx512f", "avx512_vnni"]})
    assert AOTIExporter().multiplies_integers
    assert not AOTIExporter(products="float").multiplies_integers
    monkeypatch.setattr(machine, "cpu", lambda: {"features": ["avx2", "fma"]})
    assert not AOTIExporter().multiplies_integers
    assert AOTIExporter().tolerance_for(plan).relative == 2e-5
