from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convnets import STATIC, Noisy, Twins, converted, images, laid_out, prepared, residual, sqnr
from torch import Tensor, nn

from qaware.engines.eager import EagerEngine
from qaware.engines.example import Example
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.static_integer import INT8, IntegerConv2d, IntegerLayer, Requantize
from qaware.errors import QawareError
from qaware.observers import observers
from qaware.recipe import Recipe

X = images()


def recipe(*rules: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({"name": "test", "rules": list(rules)})


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scheme", [{}, {"per_tensor": True, "symmetric": False}, {"bits": 4}])
def test_prepared_and_converted_agree_exactly(seed: int, scheme: dict[str, Any]) -> None:
    model = residual(seed)
    plan = laid_out(model, X, **scheme)
    ready = prepared(model, plan, X)
    other = images(16, seed=seed)
    with torch.no_grad():
        result = converted(ready, plan).module(other)
        assert torch.equal(ready(other), result)
        assert sqnr(model(other), result) > (10 if scheme.get("bits") == 4 else 25)


def test_agreement_holds_after_training() -> None:
    model = residual()
    plan = laid_out(model, X)
    ready = EagerEngine().prepare(copy.deepcopy(model), plan).train()
    optimizer = torch.optim.SGD(ready.parameters(), 0.05)
    losses = []
    for observer in observers(ready):
        observer.observing = True
    for _ in range(8):
        loss = F.cross_entropy(ready(X), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for observer in observers(ready):
        observer.observing = False
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        assert torch.equal(ready.eval()(X), converted(ready, plan).module(X))


def test_names_hooks_and_the_float_computation_stay() -> None:
    model = residual()
    seen = []
    model.block1.bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    plan = laid_out(model, X)
    seen.clear()
    ready = prepared(model, plan, X)
    set_fake_quant(ready, False)
    seen.clear()
    with torch.no_grad():
        assert torch.equal(ready(X), model(X))
    assert seen == ["bn1", "bn1"]
    assert set(model.state_dict()) < set(ready.state_dict())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in ready.named_parameters()}
    assert EagerEngine().prepare(ready, plan) is ready


def test_the_integers_and_grids_are_what_the_modules_hold() -> None:
    model = residual()
    plan = laid_out(model, X)
    quantized = converted(prepared(model, plan, X), plan)
    assert set(quantized.weights) == set(plan.quantized)
    assert set(quantized.outputs) == set(plan.quantized) | {s.name for s in plan.layout.operations}  # type: ignore[union-attr]
    for name, weight in quantized.weights.items():
        layer: Any = quantized.module.get_submodule(name)
        assert isinstance(layer, IntegerLayer)
        assert layer.weight.dtype == torch.int8
        assert torch.equal(layer.weight.flatten(1), weight.data)
        torch.testing.assert_close(layer.arithmetic.weight(layer).flatten(1), weight.dequantize())
        assert layer.output_grid == quantized.outputs[name]
        assert layer.input_grid == quantized.activations[name]
    block: Any = quantized.module.block1
    assert isinstance(block.conv1, IntegerConv2d)
    assert type(block.bn1) is nn.Identity
    assert isinstance(block.qaware_operations["add_0"].quantizer, Requantize)
    assert quantized.outputs["stem.0"].zero_point == INT8[0]  # after a ReLU
    assert not any(p.requires_grad for p in quantized.module.parameters())
    assert quantized.bytes < sum(p.numel() * 4 for p in model.parameters()) / 2


def test_every_value_between_two_layers_is_an_integer() -> None:
    model = residual()
    plan = laid_out(model, X)
    quantized = converted(prepared(model, plan, X), plan)
    checked = []

    def look(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        steps = output / module.output_grid.scale + module.output_grid.zero_point
        torch.testing.assert_close(steps, steps.round().clamp(*INT8), rtol=0, atol=1e-3)
        checked.append(module)

    for module in quantized.module.modules():
        if isinstance(module, IntegerLayer):
            module.register_forward_hook(look)
    quantized.module(X)
    assert len(checked) == len(plan.quantized)


class Mixed(nn.Module):
    """Convolutions, a layer for dynamic ranges, and an addition around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.mix = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(self.mix(x) + x)


def test_other_layers_are_the_modules_engines() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    dynamic = {"bits": 4, "group_size": 32, "activation": "int8-dynamic"}
    rules = recipe({"name": "mix", "scheme": dynamic}, {"name": "*", "scheme": STATIC})
    plan = EagerEngine().lay_out(model, rules.match(model), Example((X,)))
    ready = prepared(model, plan, X)
    quantized = converted(ready, plan)
    assert set(quantized.weights) == {"conv", "mix", "head"}
    assert "qaware_operations" not in dict(quantized.module.mix.named_children())  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(ready(X), quantized.module(X))


def test_convolutions_with_weights_alone_need_no_data() -> None:
    model = residual()
    plan = recipe({"type": "Conv2d", "scheme": {"bits": 4, "group_size": 3}}).match(model)
    with pytest.raises(QawareError, match=r"block2.down.0: group_size 3 does not divide its 8 input weights"):
        plan.require_possible()
    plan = recipe({"type": "Conv2d", "scheme": {"bits": 4}}).match(model)
    plan = EagerEngine().lay_out(model, plan, Example())
    ready = EagerEngine().prepare(copy.deepcopy(model), plan).eval()
    with torch.no_grad():
        assert torch.equal(ready(X), converted(ready, plan).module(X))
        assert 5 < sqnr(model(X), ready(X)) < 60


class Branch(nn.Module):
    """Takes another path for other data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.rare = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.rare(x) + x if x.mean() > 100 else x


def test_what_the_example_does_not_reach_is_listed_as_float() -> None:
    model = Branch().eval()
    plan = laid_out(model, X)
    reasons = {d.module: d.reason for d in plan.skipped if d.parameter.endswith("weight")}
    assert reasons == {
        "rare": "stays float: the example batch does not reach it, so nothing is known of its activations"
    }
    quantized = converted(prepared(model, plan, X), plan)
    assert type(quantized.module.rare) is nn.Conv2d
    assert quantized.module(X + 1e4).isfinite().all()


class Statement(nn.Module):
    """Adds in place and goes on with the old name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        z.add_(y)
        return z


def test_an_addition_that_cannot_be_watched_stays_float() -> None:
    model = Statement().eval()
    plan = laid_out(model, X)
    assert plan.layout is not None
    assert plan.layout.operations == ()
    ready = prepared(model, plan, X)
    with torch.no_grad():
        assert sqnr(model(X), converted(ready, plan).module(X)) > 25


def test_half_precision_models_compute_in_float32() -> None:
    model = residual().bfloat16()
    x = X.bfloat16()
    plan = laid_out(model, x)
    ready = prepared(model, plan, x)
    with torch.no_grad():
        result = converted(ready, plan).module(x)
        assert torch.equal(ready(x), result)
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"bits": 16}, r"stem.0: bits: 16 is for Linear and Embedding, not Conv2d; use bits: 8"),
        (
            {"bits": 8, "activation": "int8-dynamic"},
            r"stem.0: activation: 'int8-dynamic' has no kernel for a",
        ),
        ({**STATIC, "group_size": 9}, r"hidden: group_size 9 does not divide|group_size: 9 with int8-static"),
    ],
)
def test_what_has_no_kernel_is_refused(scheme: dict[str, Any], message: str) -> None:
    model = residual()
    with pytest.raises(QawareError, match=message):
        EagerEngine().lay_out(model, recipe({"name": "*", "scheme": scheme}).match(model), Example((X,)))


def test_an_example_that_does_not_fit_is_named() -> None:
    model = residual()
    with pytest.raises(QawareError, match=r"Residual: cannot run on the example batch \(\(8, 12\)\): Ru"):
        laid_out(model, X[:, 0, 0])


def test_convert_needs_prepare_and_data() -> None:
    model = residual()
    plan = laid_out(model, X)
    with pytest.raises(QawareError, match=r"stem.0: is not prepared; call prepare"):
        converted(model, plan)
    ready = EagerEngine().prepare(copy.deepcopy(model), plan)
    with pytest.raises(QawareError, match="no finite activation was observed"):
        converted(ready, plan)
    with pytest.raises(QawareError, match="needs the layout of an example batch"):
        EagerEngine().prepare(model, recipe({"name": "*", "scheme": STATIC}).match(model))


def test_biases_ship_as_whole_numbers_of_products() -> None:
    model = residual()
    plan = laid_out(model, X)
    quantized = converted(prepared(model, plan, X), plan)
    for name, weight in quantized.weights.items():
        layer: Any = quantized.module.get_submodule(name)
        assert weight.scale is not None
        unit = weight.scale.flatten().double() * quantized.activations[name].scale
        units = layer.bias.double() / unit
        torch.testing.assert_close(units, units.round(), rtol=0, atol=1e-2)
        assert units.abs().max() > 1


class Clipped(nn.Module):
    """ReLU6 after a layer and after an addition, as in MobileNets."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.a(x * 20))
        return F.relu6(self.b(x) + x)


def test_the_ceiling_of_a_relu_is_the_end_of_the_grid() -> None:
    torch.manual_seed(0)
    model = Clipped().eval()
    plan = laid_out(model, X)
    ready = prepared(model, plan, X)
    quantized = converted(ready, plan)
    for grid in (quantized.outputs["a"], quantized.outputs["qaware_operations.add_0"]):
        assert (INT8[1] - grid.zero_point) * grid.scale == pytest.approx(6.0)
    other = images(seed=5) * 3
    with torch.no_grad():
        assert torch.equal(ready(other), quantized.module(other))
        assert sqnr(model(X), quantized.module(X)) > 30
        set_fake_quant(ready, False)
        assert torch.equal(ready(other), model(other))


def test_an_addition_of_training_alone_is_left_alone() -> None:
    model = Noisy()
    ready = prepared(model, laid_out(model, X), X)
    set_fake_quant(ready, False)
    with torch.no_grad():
        assert torch.equal(ready.train()(X), model.train()(X))


def test_a_block_that_runs_twice_is_rounded_both_times() -> None:
    torch.manual_seed(0)
    model = Twins().eval()
    plan = laid_out(model, X)
    ready = prepared(model, plan, X)
    with torch.no_grad():
        result = converted(ready, plan).module(X)
        assert torch.equal(ready(X), result)
        assert sqnr(model(X), result) > 30


def test_a_dead_channel_keeps_its_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    first: Any = model[0]
    with torch.no_grad():
        first.weight[0] = 0
        first.bias[0] = 0.5
        first.weight[1] *= 1e-7
    plan = laid_out(model, X)
    ready = prepared(model, plan, X)
    quantized = converted(ready, plan)
    scale = quantized.weights["0"].scale
    assert scale is not None
    assert scale.min() > scale.max() / 5000
    with torch.no_grad():
        assert torch.equal(ready(X), quantized.module(X))
        assert sqnr(model(X), quantized.module(X)) > 30
    assert float(quantized.module[0].bias[0]) == pytest.approx(0.5, abs=1e-3)  # type: ignore[index]


class Reads(nn.Module):
    """Looks at the weight of one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.a.weight.abs().sum()


def test_a_layer_whose_weight_is_read_elsewhere_stays_float() -> None:
    model = Reads().eval()
    plan = laid_out(model, X)
    assert list(plan.quantized) == ["b"]
    reason = next(d.reason for d in plan.skipped if d.parameter == "a.weight")
    assert reason == "stays float: the model's own code reads its weight, which it would find to be integers"
    with torch.no_grad():
        assert sqnr(model(X), converted(prepared(model, plan, X), plan).module(X)) > 30
