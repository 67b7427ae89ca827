"""SmoothQuant: outliers of activations that ruin int8 are gone from them, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import Decoder, called, ids, plant_outliers
from torch import Tensor, nn

import qaware
from qaware.errors import QawareError
from qaware.recipe import Recipe
from qaware.rounding import smoothquant
from qaware.roundings import SmoothQuant

STATIC = {"bits": 8, "activation": "int8-static", "per_tensor": True}


def recipe(rounding: Any = "smoothquant", scheme: dict[str, Any] = STATIC, **more: Any) -> Recipe:
    return Recipe.from_dict({"rounding": rounding, "rules": [{"type": "Linear", "scheme": scheme}], **more})


def decoder(outliers: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Decoder().eval().requires_grad_(False)
    nn.init.normal_(model.head.weight, std=1.0)
    if outliers:
        plant_outliers(model, called(ids()), 50)
    return model


def perplexity(model: nn.Module, teacher: nn.Module) -> float:
    """Of what the teacher would say; its own is the smallest."""
    batch = torch.randint(0, 16, (32, 6), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted, given = teacher(batch).softmax(-1), model(batch).log_softmax(-1)
    return float((-(wanted * given).sum(-1).mean()).exp())


def calibration() -> list[Tensor]:
    return [torch.randint(0, 16, (8, 6), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def quantized(model: nn.Module, made: Recipe, **options: Any) -> qaware.QuantizedModel:
    return qaware.quantize(model, made, calibration=calibration(), calibration_batches=4, **options)


@pytest.mark.parametrize("scheme", [STATIC, {**STATIC, "per_tensor": False}], ids=["tensor", "channel"])
def test_static_ranges_with_outliers(scheme: dict[str, Any]) -> None:
    model = decoder()
    best = perplexity(model, model)
    assert best == pytest.approx(perplexity(decoder(False), model), rel=1e-4)
    assert perplexity(quantized(model, recipe("rtn", scheme)).module, model) > 1.1 * best
    found = quantized(model, recipe("smoothquant", scheme))
    assert perplexity(found.module, model) < 1.02 * best
    notes = {layer.name: layer.note for layer in found.rounding.layers}
    assert notes.keys() == found.weights.keys()
    assert all(note.startswith("smoothquant: ") and " times, in " in note for note in notes.values())


def test_dynamic_ranges_with_outliers() -> None:
    model = decoder()
    scheme = {"bits": 8, "activation": "int8-dynamic"}
    plain, smooth = (
        perplexity(quantized(model, recipe(r, scheme)).module, model) for r in ("rtn", "smoothquant")
    )
    best = perplexity(model, model)
    assert smooth - best < (plain - best) / 4


def test_the_eager_engine() -> None:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    model.eval().requires_grad_(False)
    x = torch.randn(16, 1, 6, 6)
    wanted = model(x)
    for row, layer in ((2, 1), (5, 3)):  # outliers that the layer after makes good
        model[layer].weight[row] *= 100
        model[layer].bias[row] *= 100
    model[3].weight[:, 2] /= 100
    model[6].weight[:, 20:24] /= 100
    torch.testing.assert_close(model(x), wanted, rtol=1e-3, atol=1e-4)
    rules = [{"name": "*", "type": kind, "scheme": STATIC} for kind in ("Conv2d", "Linear")]
    errors = []
    for rounding in ("rtn", "smoothquant"):
        made = Recipe.from_dict({"rounding": rounding, "rules": rules})
        found = qaware.quantize(model, made, calibration=[x], calibration_batches=1, engine="eager")
        errors.append(float((found.module(x) - wanted).square().mean()))
    assert errors[1] < errors[0] / 4


def folded(model: nn.Module, made: Recipe, **options: Any) -> dict[str, str]:
    return smoothquant.fold(model, made.match(model), called(ids()), SmoothQuant(**options))


def test_all_of_an_outlier_moves_at_alpha_1() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    nn.init.normal_(model[0].weight, 1.0)
    x = torch.randn(64, 8)
    made = recipe()
    smoothquant.fold(model, made.match(model), called(x), SmoothQuant(alpha=1.0))
    torch.testing.assert_close(model[0](x).abs().amax(0), torch.ones(8))
    smoothquant.fold(model, made.match(model), called(x), SmoothQuant(alpha=0.0))
    torch.testing.assert_close(model[1].weight.abs().amax(0), torch.ones(8))
    smoothquant.fold(model, made.match(model), called(x), SmoothQuant(alpha=0.5))
    torch.testing.assert_close(model[1].weight.abs().amax(0), model[0](x).abs().amax(0))


def test_layers_with_float_activations_are_left_alone() -> None:
    model = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert folded(model, recipe(scheme={"bits": 8})) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_stays_float_takes_the_scale_too() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            x = model["norm"](x)
            return model["a"](x) + model["b"](x)

    two = Two().eval()
    before = two.inner["b"].weight.clone()
    made = Recipe.from_dict({"rounding": "smoothquant", "rules": [{"name": "*.a", "scheme": STATIC}]})
    notes = smoothquant.fold(two, made.match(two), called(torch.randn(16, 8)), SmoothQuant())
    assert list(notes) == ["inner.a"]
    assert not torch.equal(two.inner["b"].weight, before)


def test_infinity_names_the_layer() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(4, 8)
    x[1, 2] = float("nan")
    with pytest.raises(QawareError, match="1: calibration gave NaN"):
        smoothquant.fold(model, recipe().match(model), called(x), SmoothQuant())


def test_float16() -> None:
    model = decoder().half()
    logits = model(ids())
    notes = folded(model, recipe())
    assert all("times" in note for note in notes.values())
    assert (model(ids()) - logits).abs().max() < 0.05 * logits.abs().max()
