"""AWQ: inputs that are large get finer weights, chosen by the error in the layers' outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import Decoder, called, ids
from folding_ranks import integers, run
from torch import Tensor, nn

import qaware
from qaware.recipe import Recipe
from qaware.rounding import awq
from qaware.roundings import Awq

WIDTH = 64
SCHEME = {"bits": 3, "group_size": 32, "scale_dtype": "bfloat16"}


def recipe(rounding: Any = "awq", scheme: dict[str, Any] = SCHEME) -> Recipe:
    return Recipe.from_dict({"rounding": rounding, "rules": [{"type": "Linear", "scheme": scheme}]})


def network(seed: int = 0) -> nn.Sequential:
    """A norm three of whose channels are larger than the others."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48)).eval().requires_grad_(False)
    nn.init.normal_(model[1].weight)
    model[0].weight[torch.randperm(WIDTH)[:3]] = 12.0
    return model


def inputs() -> Tensor:
    return torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(9))


def error(model: nn.Module, rounding: Any, x: Tensor) -> float:
    found = qaware.quantize(model, recipe(rounding), calibration=[x], calibration_batches=1)
    return float((found.module(x) - model(x)).square().mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("chooser", "share"), [("rtn", 0.8), ("mse", 0.92)])
def test_the_output_is_nearer(chooser: str, share: float, seed: int) -> None:
    model, x = network(seed), inputs()
    assert error(model, ["awq", chooser], x) < share * error(model, chooser, x)


def test_the_exponent_is_the_best_of_all() -> None:
    x = inputs()
    errors = []
    for exponent in (index / 4 for index in range(5)):
        model = network()
        sizes = model[0](x).square().mean(0).sqrt()
        wanted = model(x)
        model[1].weight.copy_(model[1].weight * sizes**exponent)
        model[0].weight.copy_(model[0].weight / sizes**exponent)
        model[0].bias.copy_(model[0].bias / sizes**exponent)
        found = qaware.quantize(model, recipe("rtn"))
        errors.append(float((found.module(x) - wanted).square().mean()))
    model = network()
    notes = awq.fold(model, recipe().match(model), called(x), Awq(candidates=5))
    best = errors.index(min(errors))
    assert 0 < best < 4
    assert notes["1"].startswith(f"awq: exponent {best / 4:.2f} in 0, error 0.")


def test_the_model_computes_the_same() -> None:
    model, x = network(), inputs()
    before, weight = model(x), model[1].weight.clone()
    awq.fold(model, recipe().match(model), called(x), Awq())
    assert not torch.equal(model[1].weight, weight)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_a_decoder_in_one_pass_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = {"bits": 3, "group_size": 4}
    found = []
    for memory in (awq._MEMORY, 0):
        monkeypatch.setattr(awq, "_MEMORY", memory)
        torch.manual_seed(0)
        model = Decoder().eval().requires_grad_(False)
        model.head.weight = model.embed.weight
        notes = awq.fold(model, recipe(["awq", "mse"], scheme).match(model), called(ids()), Awq())
        found.append((notes, model.state_dict()))
    assert found[0][0] == found[1][0]
    assert found[0][0]["head"] == "awq: not scaled, its weight is tied to another layer's"
    assert found[0][0]["attention.out"].startswith("awq: exponent")
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chooser", ["rtn", "mse", "gptq"])
def test_the_report_and_the_integers(chooser: str) -> None:
    model, x = network(), inputs()
    found = qaware.quantize(model, recipe(["awq", chooser]), calibration=[x], calibration_batches=1)
    (layer,) = found.rounding.layers
    assert (layer.name, layer.method) == ("1", "awq" if chooser == "rtn" else f"awq+{chooser}")
    assert "of unscaled" in layer.note
    weight = found.weights["1"]
    assert int(weight.data.min()) >= -4
    assert int(weight.data.max()) <= 3


def test_no_layer_to_scale() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8))
    notes = awq.fold(model, recipe().match(model), called(inputs()), Awq())
    assert notes == {"0": "awq: not scaled, nothing before it takes the scale"}


def test_two_processes_find_the_same_scales(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    alone = integers()
    for name, (values, scale) in alone.items():
        assert torch.equal(first[name][0], second[name][0])
        assert torch.equal(first[name][1], second[name][1])
        torch.testing.assert_close(first[name][1], scale, rtol=1e-4, atol=1e-6)
        assert float((first[name][0] != values).float().mean()) < 0.02
