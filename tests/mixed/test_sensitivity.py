"""What each layer costs: measured, estimated, and the model left as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import qaware
from qaware.errors import QawareError
from qaware.mixed.estimate import rank_correlation
from qaware.mixed.sensitivity import Sensitivity, measure
from qaware.mixed.source import head
from qaware.mixed.trial import Source, Trials
from qaware.mixed.weights import stored_weights
from qaware.recipe import Recipe
from qaware.tasks import LanguageTask, UnscoredTask

RECIPE = Recipe.from_dict(
    {
        "name": "low",
        "rules": [
            {"role": "embedding", "scheme": {"bits": 3}},
            {"type": "Linear", "scheme": {"bits": 3, "activation": "int8-dynamic"}},
        ],
    }
)


@pytest.fixture
def result(tiny: nn.Module, task: LanguageTask) -> Sensitivity:
    return measure(tiny, RECIPE.match(tiny), task, "both")


def by_name(result: Sensitivity) -> dict[str, Any]:
    return {layer.label: layer for layer in result.layers}


def test_tied_layers_are_one_and_the_worst_comes_first(result: Sensitivity) -> None:
    assert set(by_name(result)) == {
        "embed = head",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
    }
    costs = [layer.exact.d_nats for layer in result.layers if layer.exact is not None]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 0


def test_a_layer_alone_costs_what_qaware_quantize_makes_it_cost(
    tiny: nn.Module, task: LanguageTask, result: Sensitivity
) -> None:
    rule = {"name": "blocks.0.up", "scheme": {"bits": 3, "activation": "int8-dynamic"}}
    converted = qaware.quantize(tiny, {"rules": [rule]}).module
    alone = task.score(lambda ids: converted(ids), lambda ids: tiny(ids))
    exact = by_name(result)["blocks.0.up"].exact
    assert exact.d_nats == pytest.approx((alone.nats or 0) - result.float_nats, abs=1e-12)
    assert exact.kl == pytest.approx(alone.kl, rel=1e-9)
    assert 0 < exact.ci95 < math.inf


def test_the_estimate_ranks_as_the_measurement_does(result: Sensitivity) -> None:
    assert result.rank_correlation is not None
    assert result.rank_correlation > 0.5


def test_the_estimate_is_near_for_small_errors(tiny: nn.Module, task: LanguageTask) -> None:
    recipe = Recipe.from_dict({"rules": [{"type": "Linear", "scheme": {"bits": 5}}]})
    for layer in measure(tiny, recipe.match(tiny), task, "both").layers:
        assert layer.exact is not None
        assert layer.estimate is not None
        assert layer.exact.kl / 5 < layer.estimate < layer.exact.kl * 5, layer.label


def test_the_estimate_runs_no_quantized_model(
    tiny: nn.Module, task: LanguageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trials, "cost", None)
    only = measure(tiny, RECIPE.match(tiny), task, "estimate")
    assert all(layer.exact is None and layer.estimate for layer in only.layers)
    assert only.together is None


def test_other_roundings_and_static_activations_are_measured_too(tiny: nn.Module, task: LanguageTask) -> None:
    scheme = {"bits": 8, "activation": "int8-static"}
    recipe = Recipe.from_dict({"rules": [{"name": "blocks.*", "scheme": scheme}]})
    source = Source(lambda: [ids.unsqueeze(0) for ids in task.windows.ids[:4]], engine="modules")
    found = measure(tiny, recipe.match(tiny), head(task, 2), "exact", source)
    assert len(found.layers) == 4
    mse = Recipe.from_dict({**RECIPE.to_dict(), "rounding": "mse"})
    both = [by_name(measure(tiny, r.match(tiny), head(task, 4))) for r in (mse, RECIPE)]
    assert both[0]["blocks.0.up"].exact != both[1]["blocks.0.up"].exact


def test_a_head_with_a_grid_of_its_own_is_a_weight_of_its_own(tiny: nn.Module) -> None:
    rules = [{"role": "embedding", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": {"bits": 4}}]
    weights = stored_weights(Recipe.from_dict({"rules": rules}).match(tiny))
    assert [w.names for w in weights if w.numel == 24 * 32] == [("embed",), ("head",)]


def test_from_a_module_and_its_loader(tiny: Any, loader: Any) -> None:
    found = qaware.sensitivity(tiny, RECIPE, loader, windows=6)
    assert found.windows == 6
    assert found.protocol["tokens"] == 6 * 23
    assert len(found.layers) == 5


def test_mistakes(tiny: Any, task: LanguageTask, loader: Any) -> None:
    plan = RECIPE.match(tiny)
    with pytest.raises(QawareError, match="method: 'exakt' is not one of exact, estimate, both"):
        measure(tiny, plan, task, "exakt")
    with pytest.raises(QawareError, match="windows: 1 must be 2 or more"):
        head(task, 1)
    with pytest.raises(QawareError, match="quantizes nothing"):
        qaware.sensitivity(tiny, {"rules": [{"type": "Conv2d", "scheme": {"bits": 8}}]}, loader)
    with pytest.raises(QawareError, match="nothing can be scored"):
        measure(tiny, plan, UnscoredTask([(task.windows.ids[0].unsqueeze(0),)], task.signature))


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # One tie, against the value of the textbook formula for ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4).
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1], [1]) is None
    assert rank_correlation([1, 1], [1, 2]) is None


def test_plain_data_has_no_infinity(tiny: nn.Module, task: LanguageTask) -> None:
    torch.manual_seed(0)
    one = measure(tiny, RECIPE.match(tiny), LanguageTask(task.windows.head(1), task.signature))
    assert one.layers[0].exact is not None
    assert math.isinf(one.layers[0].exact.ci95)
    assert one.to_dict()["layers"][0]["exact"]["ci95"] is None
