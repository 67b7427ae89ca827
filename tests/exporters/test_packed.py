"""Packed layers in eager mode: what they store, and that they compute what the converted layers compute."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    _apply_int8_act_asym_per_token_quant_dequant as torchao_round,
)

from qaware import QawareError, Scheme, recipe_names
from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.modules import ModulesEngine
from qaware.exporters.aoti import AOTIExporter
from qaware.exporters.packed import PackedWeight, pack
from qaware.exporters.packed_layers import PackedLinear, pack_layers, round_per_token
from qaware.parity import compare
from qaware.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from tiny import quantize, tokens


def packed(quantized: QuantizedModel) -> QuantizedModel:
    work = copy.deepcopy(quantized)
    pack_layers(work)
    return work


def random_weight(scheme: Scheme, rows: int, width: int, seed: int) -> QuantizedWeight:
    random = torch.Generator().manual_seed(seed)
    low, high = scheme.range
    blocks = (rows, width // scheme.block(width))
    zero = torch.randint(low, high + 1, blocks, generator=random, dtype=torch.int8)
    scale = torch.rand(blocks, generator=random).to(getattr(torch, scheme.scale_dtype)).float()
    data = torch.randint(low, high + 1, (rows, width), generator=random, dtype=torch.int8)
    return QuantizedWeight(data, scale, None if scheme.symmetric else zero, scheme)


def one_rule(scheme: Scheme) -> Recipe:
    rule = {"name": "*", "scheme": scheme.to_dict()}
    return Recipe.load(
        {"name": "one", "rules": [{"role": "embedding", "scheme": scheme.weight.to_dict()}, rule]}
    )


def same(a: nn.Module, b: nn.Module, *inputs: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(a(*inputs), b(*inputs))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("width", "group"), [(64, 0), (64, 32), (96, 16), (33, 0), (7, 0), (24, 8), (40, 20)]
)
def test_integers_come_back_and_values_are_exact(bits: int, width: int, group: int) -> None:
    for seed, symmetric in itertools.product(range(3), (True, False)):
        weight = random_weight(
            Scheme(bits, group, symmetric=symmetric, scale_dtype="bfloat16"), 5, width, seed
        )
        stored = PackedWeight(weight)
        assert torch.equal(stored.integers(), weight.data)
        assert torch.equal(stored.dequantize(), weight.dequantize())
        rows = torch.tensor([[4, 0], [0, 3]])
        assert torch.equal(stored.dequantize(rows), weight.dequantize()[rows])


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_takes_its_bits(bits: int) -> None:
    weight = random_weight(Scheme(bits), 3, 64, 0)
    planes = pack(weight.data, weight.scheme)
    assert sum(p.numel() for p in planes.values()) == 3 * 64 * bits // 8
    assert {p.dtype for p in planes.values()} == {torch.int8 if bits == 8 else torch.uint8}


def test_a_byte_of_four_bits_holds_distant_columns() -> None:
    (plane,) = pack(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8), Scheme(4)).values()
    assert plane.tolist() == [[0 + 16 * 8, 15 + 16 * 9]]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", recipe_names())
def test_named_recipes_compute_the_same(name: str, tie: bool) -> None:
    quantized = quantize(name, tie)
    work = packed(quantized)
    for length in (1, 2, 33):
        assert same(quantized.module, work.module, tokens(length, seed=length))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_scheme_computes_the_same(bits: int) -> None:
    activations = ("none", "int8-dynamic", "int8-static")
    for group, symmetric, activation in itertools.product((0, 16), (True, False), activations):
        scheme = Scheme(bits, group, activation, symmetric, "float16" if group else "float32")
        quantized = quantize(one_rule(scheme), seed=bits)
        assert same(quantized.module, packed(quantized).module, tokens(20)), scheme


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["none", "int8-dynamic", "int8-static"])
def test_half_precision_models_compute_the_same(dtype: torch.dtype, activation: str) -> None:
    model = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 8)).to(dtype).eval()
    quantized = convert(model, Scheme(4, 16, activation, scale_dtype="bfloat16"), tokens(9) % 20)
    work = packed(quantized)
    assert work.module(tokens(9) % 20).dtype == dtype
    assert same(quantized.module, work.module, tokens(9) % 20)


def convert(model: nn.Module, scheme: Scheme, *example: Tensor) -> QuantizedModel:
    from qaware.observers import observers

    plan = one_rule(scheme).match(model)
    ModulesEngine().prepare(model, plan)
    for observer in observers(model):
        observer.observing = True
    model(*example)
    return ModulesEngine().convert(model, plan)


def test_dynamic_rounding_is_torchaos() -> None:
    for dtype, seed in itertools.product((torch.float32, torch.bfloat16, torch.float16), range(20)):
        x = (
            torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed / 4 - 2)
            + seed % 3
        )
        assert torch.equal(round_per_token(x.to(dtype)), torchao_round(x.to(dtype)))
    assert torch.equal(round_per_token(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_static_rounding_is_torchs() -> None:
    layer = PackedLinear(4, 4)
    layer.activation = "int8-static"
    for seed in range(50):
        random = torch.Generator().manual_seed(seed)
        scale = float(
            torch.rand((), generator=random) * 10 ** (seed / 10 - 3) + 1e-9
        )  # a float32, as observed
        layer.static = ActivationRange(scale, seed * 5 - 128)
        x = torch.randn(1000, generator=random) * scale * 100
        # Values halfway between two steps are where another formula would differ.
        x = torch.cat([x, (torch.arange(-300, 300) + 0.5) * torch.tensor(scale)])
        expected = torch.fake_quantize_per_tensor_affine(x, scale, seed * 5 - 128, -128, 127)
        assert torch.equal(layer.round(x), expected)


@pytest.mark.parametrize("name", ["int4-weight-only", "float16"])
def test_tied_layers_share_what_is_stored(name: str) -> None:
    module = packed(quantize(name, tie=True)).module
    stored = [
        dict(layer.named_buffers()) | dict(layer.named_parameters())
        for layer in (module.embed, module.lm_head)
    ]
    addresses = [[t.data_ptr() for t in tensors.values()] for tensors in stored]
    assert addresses[0] == addresses[1]


def test_only_tied_layers_share() -> None:
    module = packed(quantize("int4-weight-only")).module
    assert module.embed.packed is not module.lm_head.packed


class Reads(nn.Module):
    """A head without a module of its own, as many tied language models are written; one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.linear = nn.Linear(32, 32)
        self.again = self.linear

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(self.linear(self.embed(ids)))
        return F.linear(F.linear(x, self.linear.weight), self.embed.weight)


@pytest.mark.parametrize("activation", ["none", "int8-dynamic"])
def test_code_that_reads_the_weight_and_modules_used_twice(activation: str) -> None:
    torch.manual_seed(0)
    quantized = convert(Reads().eval(), Scheme(3, 8, activation), tokens(9) % 50)
    work = packed(quantized)
    assert work.module.linear is work.module.again
    assert same(quantized.module, work.module, tokens(12) % 50)


def test_hooks_survive() -> None:
    quantized = quantize("int8-weight-only")
    quantized.module.qkv.register_forward_hook(lambda module, args, output: output * 2)
    assert same(quantized.module, packed(quantized).module, tokens(8))


def test_a_scale_that_does_not_fit_is_refused() -> None:
    weight = random_weight(Scheme(4, scale_dtype="bfloat16"), 3, 8, 0)
    wrong = dataclasses.replace(weight, scale=weight.scale * 1.001)
    with pytest.raises(QawareError, match="not exact in bfloat16"):
        PackedWeight(wrong)


def test_an_embedding_that_renormalizes_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 8)).eval()
    quantized = convert(model, Scheme(8), tokens(4) % 20)
    with pytest.raises(QawareError, match=r"0: max_norm 1\.0"):
        pack_layers(quantized)


def swap_nibbles(weight: Any) -> None:
    weight.plane4.copy_(weight.plane4 >> 4 | weight.plane4 << 4)


def drop_scale(weight: Any) -> None:
    weight.scale.fill_(1)


@pytest.mark.parametrize("damage", [swap_nibbles, drop_scale])
@pytest.mark.parametrize("name", ["int4-weight-only", "int8-dynamic-int4-weight"])
def test_wrong_integers_and_scales_exceed_the_tolerance(name: str, damage: Any) -> None:
    quantized = quantize(name)
    inputs = [(tokens(64, seed),) for seed in range(2)]
    assert compare(packed(quantized).module, quantized.module, inputs).within(AOTIExporter.tolerance)
    for layer in quantized.weights:
        work = packed(quantized)
        damage(work.module.get_submodule(layer).packed)
        assert not compare(work.module, quantized.module, inputs).within(AOTIExporter.tolerance), layer
