"""Rounding the rows that are looked up is rounding the table, bit for bit, and the same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.qat import FakeQuantizedEmbedding

from qaware.engines.fake_quant import set_fake_quant, set_softness
from qaware.engines.modules import ModulesEngine
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme

ROWS, WIDTH = 40, 32
IDS = torch.tensor([[3, 0, 7], [39, 3, 3]])
SCHEMES: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 16, "scale_dtype": "bfloat16"},
    {"bits": 8, "symmetric": False},
    {"bits": 2, "levels": "ternary"},
    {"bits": 2, "group_size": 16, "levels": "stretched"},
    {"bits": 16},
]


def prepared(scheme: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, WIDTH, **options)).to(dtype)
    with torch.no_grad():
        model[0].weight[7] = 0
        model[0].weight[3, 5] = 9  # alone on its scale
    recipe = Recipe("r", (Rule(Scheme(**scheme), type="Embedding"),))
    ModulesEngine().prepare(model, recipe.match(model))
    return model[0]


def of_the_table(layer: Any, ids: Tensor) -> Tensor:
    return FakeQuantizedEmbedding.forward(layer, ids)  # type: ignore[no-any-return]


def trained(layer: Any, found: Tensor) -> Tensor:
    layer.weight.grad = None
    (found.float() * torch.arange(found.numel()).view_as(found)).sum().backward()
    grad: Tensor = layer.weight.grad
    return grad.to_dense() if grad.is_sparse else grad


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: Scheme(**scheme).label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_table(scheme: dict[str, Any], dtype: torch.dtype) -> None:
    layer = prepared(scheme, dtype)
    rows, table = layer(IDS), of_the_table(layer, IDS)
    assert rows.shape == (2, 3, WIDTH)
    assert torch.equal(rows, table)
    assert rows.dtype == dtype
    # Of a row that is looked up more than once the sum is taken before the table is rounded, or after.
    torch.testing.assert_close(trained(layer, rows), trained(layer, table))


def test_chosen_scales_are_those_of_the_rows() -> None:
    layer = prepared({"bits": 4, "group_size": 16})
    scale = 0.1 + torch.rand(ROWS, 2)
    layer.weight_fake_quantizer.fixed = scale, torch.zeros_like(scale, dtype=torch.int32)
    assert torch.equal(layer(IDS), of_the_table(layer, IDS))


@pytest.mark.parametrize(
    "options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}], ids=str
)
def test_options_of_an_embedding(options: dict[str, Any]) -> None:
    layer = prepared({"bits": 8}, **options)
    before = layer.weight.detach().clone()
    rows, table = layer(IDS), of_the_table(layer, IDS)
    assert torch.equal(rows, table)
    torch.testing.assert_close(trained(layer, rows), trained(layer, table))
    assert torch.equal(layer.weight, before)


def test_a_sparse_gradient_stays_sparse() -> None:
    layer = prepared({"bits": 8}, sparse=True)
    layer(IDS).sum().backward()
    assert layer.weight.grad.is_sparse
    assert layer.weight.grad.coalesce().indices().tolist() == [[0, 3, 7, 39]]


def looked_at(layer: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were rounded."""
    seen: list[int] = []
    kind = type(layer.weight_fake_quantizer)
    of_rows, whole = kind.of_rows, kind.forward
    monkeypatch.setattr(
        kind, "of_rows", lambda self, x, index: seen.append(len(x)) or of_rows(self, x, index)
    )
    monkeypatch.setattr(kind, "forward", lambda self, x: seen.append(len(x)) or whole(self, x))
    layer(ids)
    monkeypatch.undo()
    return seen


def test_the_table_is_rounded_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = prepared({"bits": 8})
    assert looked_at(layer, IDS, monkeypatch) == [6]
    assert looked_at(layer, torch.zeros(ROWS, dtype=torch.int64), monkeypatch) == [ROWS]  # as many as it has
    set_softness(layer, 0.5)
    assert looked_at(layer, IDS, monkeypatch) == [ROWS]
    set_softness(layer, 0)
    set_fake_quant(layer, False)
    assert torch.equal(layer(IDS), nn.functional.embedding(IDS, layer.weight))
    layer.weight_fake_quantizer = WeightFakeQuantizer(Scheme(8, activation="int8-static", per_tensor=True))
    assert looked_at(layer, IDS, monkeypatch) == [ROWS]


def test_nothing_to_look_up() -> None:
    assert prepared({"bits": 4, "group_size": 16})(IDS[:0]).shape == (0, 3, WIDTH)
