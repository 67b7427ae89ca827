"""Rounding whole models: by the front door, over seeds, methods and engines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convnets import STATIC, converted, images, laid_out, prepared, residual
from recorded import recorded
from rounded import Net, ids, net, prepare, quantized, recipe
from torch import Tensor, nn

import qaware
from qaware.engines.base import QuantizedModel
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.rounding.rounder import Rounder

METHODS: list[Any] = [
    "mse",
    "percentile",
    "hqq",
    "gptq",
    {"gptq": {"signed": True, "act_order": True, "correct": False}},
    ["gptq", "bias-correction"],
    ["rtn", "bias-correction"],
]
INT4 = {"bits": 4, "group_size": 16, "scale_dtype": "bfloat16"}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
def test_prepared_is_converted_bit_for_bit(method: Any, tie: bool) -> None:
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float32)):
        model: Any = net(seed, tie).to(dtype)
        scheme = {**INT4, "activation": "int8-dynamic"} if seed == 3 else INT4
        plan = recipe(method, scheme).match(model)
        rounder = Rounder(model, plan, lambda model=model, seed=seed: recorded(model, ids(seed)))
        ModulesEngine().prepare(model, rounder.plan)
        with torch.no_grad():
            rounder.round(model)
            before = model(ids(9)[0])
            made = ModulesEngine().convert(copy.deepcopy(model), rounder.plan)
            assert torch.equal(made.module(ids(9)[0]), before)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_static_networks_too(method: Any) -> None:
    for seed in range(2):
        model, x = residual(seed), images(seed=seed)
        plan = laid_out(model, x)
        made = qaware.Recipe.from_dict({**plan.recipe.to_dict(), "rounding": method})
        plan = made.match(model).with_layout(plan.layout)
        rounder = Rounder(model, plan, lambda model=model, x=x: recorded(model, [x]))
        ready = prepared(model, plan, x)
        with torch.no_grad():
            rounder.round(ready)
            assert torch.equal(converted(ready, plan).module(x), ready(x))


def outputs(model: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def distance(model: nn.Module, found: QuantizedModel) -> float:
    return float((outputs(found.module, ids()) - outputs(model, ids())).square().mean())


def test_the_order_of_methods() -> None:
    """Mean squared error of the output."""
    found = dict.fromkeys(("rtn", "mse", "hqq", "gptq"), 0.0)
    for seed in range(4):
        model = net(seed)
        for method in found:
            found[method] += distance(model, quantized(model, method, INT4))
    assert found["gptq"] < 0.5 * found["mse"]
    assert found["mse"] < 0.95 * found["rtn"]
    assert found["hqq"] < found["rtn"]


def test_the_report() -> None:
    made = quantized(net(tie=True), "gptq").rounding
    by_name = {layer.name: layer for layer in made.layers}
    assert list(by_name) == ["head", "embed", "gate", "up", "down"]
    assert by_name["head"].tie == "tied to embed: one set of integers"
    assert by_name["embed"].tie == "tied to head: one set of integers"
    assert {layer.method for layer in made.layers} == {"gptq"}
    assert all(0 < layer.error < layer.rtn_error < 0.1 for layer in made.layers)


def test_tied_layers_share_integers_and_parted_ones_do_not() -> None:
    tied = quantized(net(tie=True), "gptq")
    assert tied.weights["head"] is tied.weights["embed"]
    rules = [{"role": "embedding", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": INT4}]
    model = net(tie=True)
    made = qaware.quantize(model, {"name": "t", "rounding": "gptq", "rules": rules}, calibration=ids())
    assert made.weights["head"].scheme.bits == 4
    assert made.weights["embed"].scheme.bits == 8
    (head,) = (layer for layer in made.rounding.layers if layer.name == "head")
    assert head.tie == "untied from embed, which has another scheme"
    assert model.head.weight is model.embed.weight


def test_an_embedding_and_a_layer_that_never_runs_are_mse() -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(32, 16)

    torch.manual_seed(0)
    made = quantized(Idle(), "gptq").rounding
    notes = {layer.name: layer.note for layer in made.layers}
    assert notes["embed"] == notes["idle"] == "mse, as no input was seen"
    assert not notes["up"]


def test_the_model_given_does_not_change() -> None:
    model = net(tie=True)
    before = copy.deepcopy(model.state_dict())
    quantized(model, ["gptq", "bias-correction"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_before_are_rounded_when_the_next_is_looked_at() -> None:
    """The second layer makes up for a first one that is rounded to almost nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).eval()
    rules = [{"name": "0", "scheme": {"bits": 2}}, {"name": "1", "scheme": {"bits": 8}}]
    x = torch.randn(400, 32)
    found = {}
    for correct in (True, False):
        made = {"name": "t", "rounding": {"gptq": {"correct": correct}}, "rules": rules}
        converted = qaware.quantize(model, made, calibration=[x]).module
        found[correct] = float((converted(x) - model(x)).square().mean())
    assert found[True] < 0.9 * found[False]


def test_broken_data_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    x = torch.ones(4, 16)
    x[1, 3] = float("nan")
    with pytest.raises(QawareError, match="0: calibration gave NaN or infinity as its input"):
        qaware.quantize(model, recipe("gptq"), calibration=[x])


def test_a_broken_weight_names_the_layer() -> None:
    model = net()
    model.up.weight.data[3, 2] = float("nan")
    for method in ("mse", "gptq"):
        with pytest.raises(QawareError, match="up: its weight has NaN"):
            quantized(model, method)


def test_a_compiled_model_is_not_compiled_again_for_each_layer() -> None:
    graphs: list[object] = []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph

    compiled: Any = torch.compile(net(), backend=backend)
    compiled(ids()[0])
    assert len(graphs) == 1
    made = quantized(compiled, "gptq").weights
    assert len(graphs) == 1
    for name, weight in quantized(net(), "gptq").weights.items():
        assert torch.equal(weight.data, made[f"_orig_mod.{name}"].data)


def test_a_network_with_a_memory() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(16, 16), nn.Linear(16, 8)
            self.register_buffer("last", torch.zeros(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            self.last = torch.tanh(2 * self.layer(x + self.last))
            return self.out(self.last)

    torch.manual_seed(0)
    model, batches = Recurrent(), [torch.randn(4, 16) for _ in range(16)]
    made = [
        qaware.quantize(model, recipe(r, {"bits": 3}), calibration=batches).module for r in ("rtn", "gptq")
    ]
    assert not made[1].last.any()

    def errors(other: nn.Module) -> float:
        model.last = torch.zeros(4, 16)
        return sum(float((other(x) - model(x)).square().mean()) for x in batches)

    rtn, gptq = map(errors, made)
    assert gptq < 0.6 * rtn


def test_no_data_is_an_error_that_says_so() -> None:
    with pytest.raises(QawareError, match="has rounding: 'gptq' and so needs data; give a loader"):
        qaware.quantize(net(), recipe("gptq"))


def test_methods_without_data_need_none() -> None:
    made = qaware.quantize(net(), recipe("mse"))
    assert {layer.note for layer in made.rounding.layers} == {""}


def test_one_batch_of_few_samples() -> None:
    model = net()
    made = qaware.quantize(model, recipe("gptq"), calibration=[ids()[0][:1, :4]])
    assert bool(outputs(made.module, ids()).isfinite().all())


class Depthwise(nn.Module):
    """Channels of very different sizes, as in networks of depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
            layers += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def test_bias_correction_helps_a_static_depthwise_network() -> None:
    x = images(64, 8) + 0.5
    found = {"plain": 0.0, "corrected": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        model = Depthwise()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data.normal_()
        for _ in range(20):  # statistics of the batch norms
            model(x)
        model.eval()
        for key, method in (("plain", "rtn"), ("corrected", ["rtn", "bias-correction"])):
            rules = [{"name": "*", "scheme": {**STATIC, "per_tensor": True}}]
            made = qaware.quantize(model, {"name": "t", "rounding": method, "rules": rules}, calibration=[x])
            with torch.no_grad():
                found[key] += float((made.module(x) - model(x)).square().mean() / model(x).var(0).mean())
    assert found["corrected"] < 0.5 * found["plain"]


def test_prepare_by_hand_and_round() -> None:
    model = net()
    recording = recorded(model, ids())
    made = recipe("gptq")
    rounder = Rounder(model, made.match(model), lambda: recording)
    prepare(model, made)
    turns: list[int] = []
    with torch.no_grad():
        report = rounder.round(model, lambda: turns.append(1))
    assert len(turns) == len(report.layers) == 5
    assert rounder.recording is None
