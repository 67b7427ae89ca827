"""The layer report: figures by hand, what is fused and joined, and that nothing is left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qaware
from qaware.engines.base import QuantizedModel
from qaware.engines.choose import engine_for
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.static_integer import Arithmetic, IntegerLayer
from qaware.layers import CEILING, LayerError, LayerReport, layer_report, sqnr
from qaware.layout import Layout


class Block(nn.Module):
    """A residual addition, a ReLU that works in place, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return torch.relu(x + self.mix(self.mix(y)))


def residual() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), Block(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 5)
    )
    norm = model[2].norm
    for tensor, low, high in (
        (norm.weight, 0.5, 1.5),
        (norm.running_var, 0.5, 2),
        (norm.running_mean, -1, 1),
    ):
        tensor.data.uniform_(low, high)
    return model.eval()


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def rows(seed: int = 0) -> Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))


def quantized(model: nn.Module, recipe: Any = "int8-static", data: Tensor | None = None) -> QuantizedModel:
    return qaware.quantize(model, recipe, [data if data is not None else rows()])


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, QuantizedModel]:
    model = residual()
    return model, quantized(model, data=pictures())


def by_name(report: LayerReport) -> dict[str, LayerError]:
    return {layer.name: layer for layer in report.layers}


def test_by_hand() -> None:
    model, x = mlp(), rows(1)
    result = quantized(model, "int8-dynamic")
    report = layer_report(model, result, x)
    found = by_name(report)
    assert list(found) == sorted(found, key=lambda name: found[name].output_sqnr)
    with torch.no_grad():
        assert found["0"].output_sqnr == pytest.approx(sqnr(model[0](x), result.module[0](x)))
        assert found["2"].output_sqnr == pytest.approx(sqnr(model(x), result.module(x)))
    weight, got = model[2].weight.detach().double(), result.weights["2"].dequantize().double()
    expected = 10 * math.log10(float(weight.square().sum() / (weight - got).square().sum()))
    assert found["2"].weight_sqnr == pytest.approx(expected)
    ends = ((result.weights["2"].data == 127) | (result.weights["2"].data == -128)).double().mean()
    assert found["2"].weight_at_ends == pytest.approx(float(ends))
    assert (found["0"].kind, found["0"].order, found["2"].order) == ("Linear", 0, 1)
    assert found["0"].input_clipped is None
    assert report.notes == ()


def test_fused_layers_and_additions_are_compared_with_the_float_value_at_the_same_place(
    both: tuple[nn.Module, QuantizedModel],
) -> None:
    model, result = both
    report = layer_report(model, result, pictures(1))
    found = by_name(report)
    addition = "2.qaware_operations.add_0"
    assert set(found) == {"0", "2.conv", "2.mix", addition, "5"}
    assert [n for n, e in sorted(found.items(), key=lambda item: item[1].order or 0)] == [
        *("0", "2.conv", "2.mix", addition, "5")
    ]
    # A wrong place, e.g. before the batch norm or the ReLU, would be far off.
    assert all(error.output_sqnr > 25 for error in report.layers)
    assert all(error.weight_sqnr > 30 for error in report.layers if error.kind != "add")
    with torch.no_grad():
        pooled = sqnr(model(pictures(1)), result.module(pictures(1)))
    assert found["5"].output_sqnr == pytest.approx(pooled)
    assert found[addition].kind == "add"
    assert report.notes == ()


def test_a_prepared_model_that_does_not_round_stands_for_the_float_one(
    both: tuple[nn.Module, QuantizedModel],
) -> None:
    model, result = both
    prepared = engine_for(result.plan).prepare(copy.deepcopy(model), result.plan)
    set_fake_quant(prepared, False)
    twin, plain = (by_name(layer_report(m, result, pictures(1))) for m in (prepared, model))
    for name, error in plain.items():
        assert twin[name].output_sqnr == pytest.approx(error.output_sqnr, abs=0.01)
        assert twin[name].weight_sqnr == pytest.approx(error.weight_sqnr)


def test_a_damaged_layer_is_the_worst(both: tuple[nn.Module, QuantizedModel]) -> None:
    model, result = both
    broken = copy.deepcopy(result)
    broken.module[2].conv.weight.data.neg_()
    broken.weights["2.conv"].data.neg_()
    report = layer_report(model, broken, pictures(1))
    first = min((e for e in report.layers if (e.output_sqnr or 0) < 15), key=lambda e: e.order or 0)
    assert first.name == "2.conv"
    assert by_name(report)["2.conv"].weight_sqnr == min(e.weight_sqnr for e in report.layers if e.weight_sqnr)


def test_clipped_values_are_counted() -> None:
    model = mlp()
    result = quantized(model)
    x = rows(1) * 3
    found = by_name(layer_report(model, result, x))
    grid = result.activations["0"]
    integers = (x / grid.scale).round() + grid.zero_point
    outside = ((integers < -128) | (integers > 127)).double().mean()
    assert found["0"].input_clipped == pytest.approx(float(outside))
    assert found["0"].input_clipped > 0.1
    assert found["0"].output_clipped > 0.01
    assert found["2"].input_clipped == 0  # it is on the grid already
    calm = by_name(layer_report(model, result, rows()))
    assert calm["0"].input_clipped == 0


def test_nothing_is_left_behind(both: tuple[nn.Module, QuantizedModel]) -> None:
    model, result = both
    before = [copy.deepcopy(m.state_dict()) for m in (model, result.module)]
    model.train()
    layer_report(model, result, pictures())
    assert model.training
    model.eval()
    for module, state in zip((model, result.module), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    layers = [m for m in result.module.modules() if isinstance(m, IntegerLayer)]
    assert {type(m.arithmetic) for m in layers} == {Arithmetic}


def test_any_arguments_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, a: Tensor, *, b: Tensor) -> dict[str, Any]:
            return {"logits": self.inner(a) + self.inner(b), "n": 1}

    model = Two()
    result = qaware.quantize(model, "int8-weight-only")
    report = layer_report(model, result, rows(), b=rows(1))
    assert report.layers[0].output_sqnr > 30


def test_an_output_that_is_changed_in_place_later_is_compared_as_it_was() -> None:
    class Erases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mul_(0)

    model = Erases()
    report = layer_report(model, qaware.quantize(model, "int8-weight-only"), rows())
    assert 30 < report.layers[0].output_sqnr < 100


def test_without_an_example_weights_are_compared() -> None:
    model = mlp()
    report = layer_report(model, quantized(model))
    assert all(e.output_sqnr is None and e.weight_sqnr > 30 and e.order is None for e in report.layers)
    assert len(report.notes) == 1
    assert "no example" in report.notes[0]


def test_a_graph_without_layers_is_compared_by_weights_up_to_the_folded_norm(
    both: tuple[nn.Module, QuantizedModel],
) -> None:
    model, result = both
    plan = dataclasses.replace(result.plan, layout=Layout("graph"))
    report = layer_report(model, dataclasses.replace(result, plan=plan), pictures())
    assert all(e.output_sqnr is None and e.weight_sqnr > 30 for e in report.layers)
    assert "one graph" in report.notes[0]


def test_layers_that_one_model_lacks_are_left_out_and_that_is_said() -> None:
    model = mlp()
    report = layer_report(nn.Sequential(model[0]), quantized(model), rows())
    found = by_name(report)
    assert found["2"].output_sqnr is found["2"].weight_sqnr is None
    assert found["0"].output_sqnr is not None
    assert "under another name" in report.notes[0]
    assert [e.name for e in report.worst()] == ["0"]


def test_float16_layers() -> None:
    model = mlp()
    recipe = {"rules": [{"type": "Linear", "scheme": {"bits": 16}}]}
    found = by_name(layer_report(model, quantized(model, recipe), rows()))
    assert found["0"].weight_sqnr > 60
    assert found["0"].weight_at_ends is None


@pytest.mark.parametrize(
    ("reference", "got", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], CEILING),
        ([3.0, 4.0], [3.0, 3.5], 20),
        ([0.0, 0.0], [0.0, 0.1], -CEILING),
        ([0.0], [0.0], CEILING),
        ([1.0], [math.nan], -CEILING),
        ([1.0], [math.inf], -CEILING),
        ([], [], CEILING),
    ],
)
def test_sqnr(reference: list[float], got: list[float], expected: float) -> None:
    assert sqnr(torch.tensor(reference), torch.tensor(got)) == pytest.approx(expected)


def test_plain_data() -> None:
    report = layer_report(mlp(), quantized(mlp()), rows())
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["layers"][0]["name"] == report.layers[0].name
    assert report.worst(1) == report.layers[:1]
