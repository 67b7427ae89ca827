"""The rewrites of quantize and dequantize operators: fewer of them, the same values."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qaware.engines.base import ActivationRange
from qaware.engines.static_integer import Requantize
from qaware.exporters.qdq import (
    DEQUANTIZE,
    QUANTIZE,
    clean,
    decompose,
    float_conv1d,
    integer_layers,
)

sys.path.insert(0, str(Path(__file__).parent))
from static_net import SIGNATURE, images, static_net

LAYERS = 6


def program(module: nn.Module):
    return torch.export.export(SIGNATURE.wrap(module), (images(4),), strict=False)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return static_net().module


@pytest.mark.parametrize("per_tensor", [False, True])
def test_decomposed_layers_compute_the_same(per_tensor: bool) -> None:
    module = static_net(per_tensor).module
    expected = module(images(5))
    assert decompose(module)
    assert torch.equal(module(images(5)), expected)
    assert not decompose(nn.Linear(3, 3))


@pytest.mark.parametrize(("dtype", "whole"), [(torch.int8, True), (torch.uint8, False)])
def test_cleaned_graphs_compute_the_same(net: nn.Module, dtype: torch.dtype, whole: bool) -> None:
    work = copy.deepcopy(net)
    decompose(work)
    made = program(work)
    before = len(made.graph.nodes)
    assert clean(made.graph_module, dtype, whole)
    assert len(made.graph.nodes) < before
    assert torch.equal(made.module()(images(4, 1)), net(images(4, 1)))
    assert integer_layers(made.graph) == LAYERS
    names = Counter(str(node.target) for node in made.graph.nodes)
    assert names["aten.to.dtype"] == 0
    # Inside the layers three, behind the addition one; those of the model's own forward are gone.
    assert names["aten.relu.default"] == 4
    rounded = [node for node in made.graph.nodes if node.target is QUANTIZE]
    assert {node.args[5] for node in rounded} == {dtype}
    assert not any(n.args[0].target is DEQUANTIZE and n.args[0].args[1:] == n.args[1:] for n in rounded)


def test_the_parts_of_a_concatenation_get_its_grid(net: nn.Module) -> None:
    work = copy.deepcopy(net)
    decompose(work)
    made = program(work)
    clean(made.graph_module, torch.int8, whole=True)
    (cat,) = [node for node in made.graph.nodes if node.target is torch.ops.aten.cat.default]
    (reader,) = cat.users
    assert all(part.args[1:] == reader.args[1:] for part in cat.args[0])


def test_a_relu_stays_where_the_grid_has_negative_values() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rounded = Requantize(ActivationRange(0.1, 0))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.rounded(x))

    module = Net()
    decompose(module)
    made = program(module)
    clean(made.graph_module, torch.int8, whole=True)
    assert any(node.target is torch.ops.aten.relu.default for node in made.graph.nodes)
    assert float(made.module()(images(4)).min()) == 0


def test_a_graph_without_grids_is_left_alone() -> None:
    made = program(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    code = made.graph_module.code
    assert not clean(made.graph_module, torch.int8, whole=True)
    assert made.graph_module.code == code
    assert integer_layers(made.graph) == 0
    assert not float_conv1d(made.graph)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_words_for_padding_become_numbers_or_an_operator(padding: str, kernel: int) -> None:
    quantized = static_net()
    layer = quantized.module.stem
    layer.weight = nn.Parameter(
        torch.randint(-127, 128, (16, 3, kernel, kernel)).to(torch.int8), requires_grad=False
    )
    layer.kernel_size, layer.padding = (kernel, kernel), padding
    whole = kernel - 1 if padding == "same" else 0
    layer._reversed_padding_repeated_twice = [whole // 2, whole - whole // 2] * 2
    expected = layer(images(2))
    decompose(quantized.module)
    assert torch.equal(layer(images(2)), expected)
    assert layer.padding == ((1, 1) if (padding, kernel) == ("same", 3) else (0, 0)) or kernel == 4
