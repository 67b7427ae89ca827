"""Learned scales: what they begin with, their gradients, ties, and that prepared and converted agree."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from convnets import converted, images, laid_out, residual
from torch import Tensor, nn

from qaware.engines.eager import EagerEngine
from qaware.engines.example import Example
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.graph import GraphEngine
from qaware.engines.learned import LearnedGrid, begin_alike, grids, learn_grids
from qaware.engines.modules import ModulesEngine
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.errors import QawareError
from qaware.observers import observers
from qaware.plan import Plan
from qaware.recipe import Recipe, Rule
from qaware.scheme import SCALE_DTYPES, Scheme

X = images()
SCHEMES = [
    Scheme(8),
    Scheme(4, 32),
    Scheme(3, 32, symmetric=False),
    Scheme(2, 32, levels="stretched"),
    Scheme(2, levels="ternary"),
]


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 16, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.embed(ids))))


def prepared(
    model: nn.Module, scheme: Scheme, learning: str = "lsq", head: Scheme | None = None
) -> tuple[Any, Plan]:
    rules = (Rule(head or scheme, role="head"), Rule(scheme, name="*"))
    plan = Recipe("r", rules, learning=learning).match(model)
    ModulesEngine().prepare(model, plan)
    learn_grids(model, plan)
    return model, plan


def trained(model: nn.Module, steps: int = 4) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(16).view(4, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("learning", ["lsq", "range"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_prepared_and_converted_agree_exactly(scheme: Scheme, learning: str) -> None:
    for seed, dtype in enumerate(SCALE_DTYPES):
        torch.manual_seed(seed)
        model, plan = prepared(Tied(), Scheme(**{**scheme.to_dict(), "scale_dtype": dtype}), learning)
        trained(model)
        ids = torch.arange(16).view(4, 4)
        with torch.no_grad():
            expected = model.eval()(ids)
            seen = model.body.weight_fake_quantizer(model.body.weight)
            converted = ModulesEngine().convert(copy.deepcopy(model), plan)
            assert torch.equal(converted.module(ids), expected)
        assert torch.equal(converted.weights["body"].dequantize(), seen)
        assert converted.weights["embed"] is converted.weights["head"]


def test_every_scale_is_trained() -> None:
    torch.manual_seed(0)
    model, _ = prepared(Tied(), Scheme(3, 32, symmetric=False), "range")
    trained(model)
    for grid in grids(model):
        assert bool(grid.gain.ne(0).all())
        assert grid.shift is not None
        assert bool(grid.shift.ne(0).any()), "weights that are clipped move the zero point"


def test_lsq_keeps_the_zero_point() -> None:
    model, _ = prepared(Tied(), Scheme(3, 32, symmetric=False), "lsq")
    assert all(grid.shift is None and grid.zero is not None for grid in grids(model))


def test_the_gradient_of_a_scale_by_hand() -> None:
    """Esser et al. 2020, equation 3: round(w / s) - w / s within the range, its ends outside; times s, as the
    gain is a logarithm, and 1 / sqrt(weights of a scale * largest integer)."""
    weight = torch.tensor([[-2.6, 0.3, 0.8, 9.0]])
    quantizer = WeightFakeQuantizer(Scheme(2))
    for learning, factor in (("lsq", (4 * 1) ** -0.5), ("range", 1.0)):
        grid = LearnedGrid(quantizer, (1, 1), learning)
        grid.base.fill_(1.0)
        grid.began.fill_(1.0)
        grid.known = True
        quantizer.learned = grid
        quantizer(weight).sum().backward()
        assert grid.gain.grad is not None
        expected = (-2) + (0 - 0.3) + (1 - 0.8) + 1
        torch.testing.assert_close(grid.gain.grad, torch.tensor([[expected * factor]]))


def test_it_begins_better_than_on_the_largest_value() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    scheme = Scheme(3, 32)
    plain = WeightFakeQuantizer(scheme)
    model, _ = prepared(nn.Sequential(nn.Linear(64, 32)), scheme)
    model[0].weight.data.copy_(weight)
    learned = model[0].weight_fake_quantizer(weight)
    assert float((learned - weight).square().sum()) < 0.9 * float((plain(weight) - weight).square().sum())


def test_weights_of_zero_can_grow() -> None:
    model, _ = prepared(nn.Sequential(nn.Linear(64, 8)), Scheme(4, 32))
    nn.init.zeros_(model[0].weight)
    quantizer = model[0].weight_fake_quantizer
    quantizer(model[0].weight)
    assert bool((quantizer.scale > 1e-3).all())
    with torch.no_grad():
        model[0].weight[0] = 0.05
        assert float(quantizer(model[0].weight)[0].mean()) > 0.02


def test_layers_that_share_a_weight_share_its_scale() -> None:
    model, _ = prepared(Tied(), Scheme(4, 32))
    assert model.embed.weight_fake_quantizer.learned is model.head.weight_fake_quantizer.learned
    assert len(grids(model)) == 2
    for other in (prepared(Tied(tie=False), Scheme(4, 32)), prepared(Tied(), Scheme(4, 32), head=Scheme(8))):
        assert len(grids(other[0])) == 3


def test_state_comes_back_exactly() -> None:
    torch.manual_seed(0)
    model, _ = prepared(Tied(), Scheme(3, 32))
    trained(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, _ = prepared(Tied(), Scheme(3, 32))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    ids = torch.arange(16).view(4, 4)
    assert torch.equal(fresh(ids), model(ids))
    trained(model, 1), trained(fresh, 1)
    assert torch.equal(fresh(ids), model(ids))


def test_float_weights_begin_the_grid_anew() -> None:
    torch.manual_seed(0)
    model, _ = prepared(Tied(), Scheme(3, 32))
    trained(model)
    other = Tied()
    with torch.no_grad():
        other.body.weight.mul_(10)
    model.load_state_dict(other.state_dict())
    model(torch.arange(16).view(4, 4))
    assert float(model.body.weight_fake_quantizer.scale.mean()) > 0.1
    assert all(bool(grid.gain.eq(0).all()) for grid in grids(model))


def test_a_float_forward_pass_leaves_every_parameter_a_gradient() -> None:
    model, _ = prepared(Tied(), Scheme(4, 32, symmetric=False), "range")
    float_model = Tied()
    float_model.load_state_dict(model.state_dict(), strict=False)
    set_fake_quant(model, False)
    ids = torch.arange(16).view(4, 4)
    output = model(ids)
    assert torch.equal(output, float_model(ids))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(grid.known for grid in grids(model)), (
        "the scale is that of the weights that rounding meets"
    )


def test_an_average_that_began_with_zeros_has_the_scale() -> None:
    torch.manual_seed(0)
    model, _ = prepared(Tied(), Scheme(4, 32))
    average = copy.deepcopy(model)
    model(torch.arange(16).view(4, 4))
    begin_alike(model, average)
    for ours, theirs in zip(grids(model), grids(average), strict=True):
        assert torch.equal(ours.base, theirs.base)
        theirs.base.mul_(0.1)  # what is left of an average with zeros
        theirs.began.mul_(0.1)
    weight = average.body.weight
    expected, found = (m.body.weight_fake_quantizer(weight) for m in (model, average))
    torch.testing.assert_close(found, expected)


def test_meta_weights_begin_when_they_are_there() -> None:
    with torch.device("meta"):
        model = Tied()
    model, _ = prepared(model, Scheme(4, 32))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert bool(model(torch.arange(16).view(4, 4)).isfinite().all())


def test_a_compiled_model_computes_the_same() -> None:
    torch.manual_seed(0)
    model, _ = prepared(Tied(), Scheme(4, 32))
    ids = torch.arange(16).view(4, 4)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    compiled(ids)
    torch.testing.assert_close(compiled(ids), model(ids))


def test_the_graph_engine_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    scheme = Scheme(8, activation="int8-static")
    plan = Recipe("r", (Rule(scheme, type="Linear"),), learning="lsq").match(model)
    plan = GraphEngine().lay_out(model, plan, Example((torch.randn(2, 64),)), "aoti", True)
    with pytest.raises(QawareError, match=r"^learning: 'lsq' is for the modules and eager.*engine: eager"):
        learn_grids(GraphEngine().prepare(model, plan), plan)


def learning_convolutions(seed: int, **scheme: Any) -> tuple[Any, Plan]:
    model = residual(seed)
    plan = laid_out(model, X, **scheme)
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, learning="lsq"))
    ready = EagerEngine().prepare(copy.deepcopy(model), plan)
    learn_grids(ready, plan)
    for observer in observers(ready):
        observer.observing = True
    optimizer = torch.optim.SGD(ready.train().parameters(), 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(ready(X), torch.arange(8) % 5).backward()
        optimizer.step()
    for observer in observers(ready):
        observer.observing = False
    return ready.eval(), plan


@pytest.mark.parametrize("scheme", [{"bits": 4}, {"per_tensor": True}, {"bits": 2, "levels": "ternary"}])
def test_convolutions_with_a_folded_norm_agree_exactly(scheme: dict[str, Any]) -> None:
    for seed in range(3):
        ready, plan = learning_convolutions(seed, **scheme)
        with torch.no_grad():
            result = converted(ready, plan)
            assert torch.equal(ready(X), result.module(X))
        for weight in result.weights.values():
            highest = weight.scheme.range[1]
            assert int(weight.data.min()) >= -highest, "integer kernels go without the smallest"
        assert all(grid.gain.abs().sum() > 0 for grid in grids(ready))


def test_a_learned_scale_follows_the_folded_norm() -> None:
    ready, _ = learning_convolutions(0, bits=4)
    layer = ready.stem[0]
    before = layer.rounded(layer.folded()[0])
    ready.stem[1].running_var.mul_(4).add_(3 * ready.stem[1].eps)
    torch.testing.assert_close(layer.rounded(layer.folded()[0]), before / 2)
