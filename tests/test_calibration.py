"""Calibration: what is on and off during a pass, whose batches are taken, and what is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

import qaware.calibration
from qaware.calibration import Look, Share, calibrate, passes, refuse_several_passes, same_draws
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.observers import observers
from qaware.recipe import Recipe


def static(observer: str = "minmax") -> Recipe:
    scheme = {"bits": 2, "activation": "int8-static", "observer": observer}
    return Recipe.from_dict({"rules": [{"type": "Linear", "scheme": scheme}]})


def prepared(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).eval()
    return ModulesEngine().prepare(model, recipe.match(model))


def x(seed: int = 0) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("observer", "count"),
    [("minmax", 1), ("moving-average", 1), ("histogram", 2), ("percentile", 2), ("mse", 2)],
)
def test_passes_run_in_float_and_everything_is_back_afterwards(observer: str, count: int) -> None:
    model, outputs, flags = prepared(static(observer)), [], []
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))(x())

    def run(look: Look) -> None:
        flags.append([o.observing for o in observers(model)])
        outputs.append(model(x()))

    assert passes(model) == count
    calibrate(model, run)
    assert flags == [[True, True]] * count
    assert all(torch.equal(output, exact) for output in outputs)
    assert not torch.equal(model(x()), exact)
    assert not any(o.observing or o.pass_index for o in observers(model))
    assert all(o.seen for o in observers(model))


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_the_prepared_model_computes_what_the_converted_one_does(observer: str) -> None:
    for seed in range(10):
        model = prepared(static(observer))
        calibrate(model, lambda look, model=model, seed=seed: model(x(seed) ** 3))
        expected = model(x(seed))
        converted = ModulesEngine().convert(model, static(observer).match(nn.Sequential(*map(plain, model))))
        assert torch.equal(converted.module(x(seed)), expected)


def plain(layer: nn.Linear) -> nn.Linear:
    return nn.Linear(layer.in_features, layer.out_features)


def test_mixed_observers_keep_to_their_own_passes() -> None:
    rules = [{"name": "0", **static("histogram").to_dict()["rules"][0]}, *static().to_dict()["rules"]]
    model, watching = prepared(Recipe.from_dict({"rules": rules})), []

    def run(look: Look) -> None:
        watching.append([o.observing for o in observers(model)])
        model(x())

    calibrate(model, run)
    assert watching == [[True, True], [True, False]]


def test_earlier_statistics_are_forgotten() -> None:
    model = prepared(static("histogram"))
    calibrate(model, lambda look: model(x() * 100))
    calibrate(model, lambda look: model(x()))
    fresh = prepared(static("histogram"))
    calibrate(fresh, lambda look: fresh(x()))
    states = zip(observers(model), observers(fresh), strict=True)
    assert all(torch.equal(a.counts, b.counts) and a.range() == b.range() for a, b in states)


def test_batches_that_are_looked_away_from_do_not_count() -> None:
    model = prepared(static())

    def run(look: Look) -> None:
        for on, batch in ((True, x()), (False, x() * 50), (True, x())):
            look(on)
            model(batch)

    calibrate(model, run)
    assert float(next(observers(model)).max_val) == float(x().max())


def test_after_an_error_nothing_observes_and_fake_quant_is_on() -> None:
    model = prepared(static("histogram"))

    def run(look: Look) -> None:
        model(x())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, run)
    assert not any(o.observing or o.pass_index for o in observers(model))
    assert all(m.enabled for m in model.modules() if hasattr(m, "enabled"))


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_a_layer_that_did_not_run_is_named(observer: str) -> None:
    model = prepared(static(observer))
    with pytest.raises(QawareError, match=r"^1: calibration saw no activation, so the layer did not run"):
        calibrate(model, lambda look: model[0](x()))


def test_nan_is_not_passed_over() -> None:
    model = prepared(static())

    def run(look: Look) -> None:
        for number, batch in enumerate([x(), x() * float("nan"), x()]):
            model(batch)
            look.done(number, {"x": batch})

    with pytest.raises(
        QawareError, match=r"batch 1 \(the first is 0\) has NaN or infinity at \['x'\] \(64 of"
    ):
        calibrate(model, run)
    assert not any(o._forward_pre_hooks for o in observers(model))


def test_every_pass_draws_the_same_and_the_caller_notices_nothing() -> None:
    model, draws = prepared(static("histogram")), []
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = float(torch.rand(())), random.random(), float(np.random.rand())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)

    def run(look: Look) -> None:
        draws.append((float(torch.rand(())), random.random(), float(np.random.rand())))
        model(x())

    calibrate(model, run)
    assert draws[0] == draws[1]
    assert (float(torch.rand(())), random.random(), float(np.random.rand())) == expected


def test_random_numbers_go_on_after_an_error() -> None:
    torch.manual_seed(5)
    expected = float(torch.rand(()))
    torch.manual_seed(5)
    with pytest.raises(RuntimeError), same_draws():
        raise RuntimeError
    assert float(torch.rand(())) == expected


@pytest.mark.parametrize("observer", ["histogram", "percentile", "mse"])
def test_two_passes_are_refused_where_data_passes_once(observer: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8))
    for once in ("minmax", "moving-average"):
        refuse_several_passes(static(once).match(model))
    words = rf"^0: observer: '{observer}' needs two passes.*observer: moving-average or minmax"
    with pytest.raises(QawareError, match=words):
        refuse_several_passes(static(observer).match(model))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 5, 99])
def test_ranks_together_take_every_batch_once(
    world: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, lengths = [], set()
    for rank in range(world):
        monkeypatch.setattr(qaware.calibration, "_place", lambda rank=rank: (rank, world))
        share = Share(range(7), count)
        for _ in range(2):
            own = list(share)
        taken += [batch for position, batch in enumerate(own) if position not in share.repeats]
        lengths.add(len(own))
    assert sorted(taken) == list(range(min(count, 7)))
    assert len(lengths) == 1


def test_a_loader_without_batches_is_an_error() -> None:
    with pytest.raises(QawareError, match="calibration: the loader gave no batch"):
        list(Share([], 4))


def test_what_can_be_iterated_once_is_kept_for_the_second_pass() -> None:
    source = iter(range(100))
    share = Share(source, 3)
    assert list(share) == list(share) == [0, 1, 2]
    assert next(source) == 3


@pytest.mark.parametrize("where", ["loader", "sampler"])
def test_a_loader_with_its_own_generator_draws_the_same_again(where: str) -> None:
    generator = torch.Generator().manual_seed(3)
    data = list(range(20))
    if where == "loader":
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    else:
        loader = DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=generator))
    before = generator.get_state()
    passes = []
    for _ in range(2):
        with same_draws():
            passes.append(torch.cat(list(Share(loader, 3))).tolist())
    assert passes[0] == passes[1]
    assert passes[0] != sorted(passes[0])
    assert torch.equal(generator.get_state(), before)
