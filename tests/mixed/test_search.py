"""The search: budgets hold, the recipe is what was measured, and the same call gives the same file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qaware
from qaware.errors import QawareError
from qaware.exporters.base import Exporter
from qaware.mixed.budget import Budget
from qaware.mixed.candidates import candidates
from qaware.mixed.choices import parse_widths
from qaware.mixed.found import Found
from qaware.mixed.search import Search, Settings
from qaware.mixed.source import head
from qaware.mixed.trial import Trials
from qaware.mixed.weights import stored_weights
from qaware.plan import Decision
from qaware.recipe import Recipe
from qaware.tasks import LanguageTask

BASE = Recipe.from_dict(
    {
        "name": "base",
        "rules": [
            {"role": "embedding", "scheme": {"bits": 3, "group_size": 16, "scale_dtype": "bfloat16"}},
            {"type": "Linear", "scheme": {"bits": 3, "group_size": 16, "scale_dtype": "bfloat16"}},
        ],
    }
)
WIDTHS = (2, 3, 4, 6)


def searched(model: nn.Module, task: LanguageTask, budget: str, **changes: Any) -> Found:
    settings = Settings(Budget.parse(budget), **{"widths": WIDTHS, **changes})
    return Search(model, BASE.match(model), task, head(task, 12), settings).run()


@pytest.fixture
def found(tiny: nn.Module, task: LanguageTask) -> Found:
    return searched(tiny, task, "4.5bpw")


def test_the_budget_holds_and_is_used(found: Found) -> None:
    assert 4.0 < found.point.bpw <= 4.5
    assert len(set(found.point.bits)) > 1


def test_the_recipe_is_what_was_measured(
    found: Found, tiny: nn.Module, task: LanguageTask, tmp_path: Path
) -> None:
    found.save(tmp_path / "recipe.yaml")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe == found.recipe
    quantized = qaware.quantize(tiny, recipe)
    score = task.score(lambda ids: quantized.module(ids), lambda ids: tiny(ids))
    cost = Trials(tiny, BASE.match(tiny), task).compare(score)
    assert cost == found.point.measured
    assert quantized.bytes == found.point.bytes
    assert f"{found.point.bytes} bytes" in recipe.description
    assert found.point.measured is not None
    assert f"{found.point.measured.d_nats:+.4f}" in recipe.description


def test_it_closes_half_of_the_gap_for_half_a_bit(tiny: nn.Module, task: LanguageTask) -> None:
    base = next(p for p in searched(tiny, task, "5bpw").uniform if set(p.bits) == {3})
    better = searched(tiny, task, f"{base.bpw + 0.5}bpw").point
    assert base.measured is not None
    assert better.measured is not None
    assert better.bpw <= base.bpw + 0.5
    assert base.measured.d_nats > 0.05
    assert better.measured.d_nats < base.measured.d_nats / 2


def test_the_same_search_gives_the_same_bytes(tiny: nn.Module, task: LanguageTask, tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        searched(tiny, task, "4bpw").save(tmp_path / name)
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()


def test_bytes_are_of_the_whole_model(tiny: nn.Module, task: LanguageTask) -> None:
    found = searched(tiny, task, "bytes=3600", method="estimate")
    quantized = qaware.quantize(tiny, found.recipe)
    assert quantized.bytes == found.point.bytes <= 3600
    assert searched(tiny, task, f"bytes={found.point.bytes}", method="estimate").point == found.point


def test_a_loss_is_met_by_measurement(tiny: nn.Module, task: LanguageTask, found: Found) -> None:
    measured = [p for p in found.frontier if p.measured is not None]
    assert measured[0].measured is not None
    target = measured[0].measured.d_nats / 3
    cheap = searched(tiny, task, f"d_nats={target}")
    assert cheap.point.measured is not None
    assert cheap.point.measured.d_nats <= target
    smaller = [p for p in cheap.frontier if p.bytes < cheap.point.bytes and p.measured is not None]
    assert smaller
    assert all(p.measured.d_nats > target for p in smaller if p.measured is not None)


def test_what_was_not_chosen_by_is_measured_apart(found: Found, tiny: nn.Module, task: LanguageTask) -> None:
    late = dataclasses.replace(task.windows, ids=task.windows.ids[12:], first=task.windows.first[12:])
    plan = BASE.match(tiny)
    rest = Trials(tiny, plan, LanguageTask(late, task.signature))
    schemes = {n: d.scheme for n, d in found.recipe.match(tiny).quantized.items() if d.scheme}
    assert found.held_out is not None
    assert found.held_out[0] == pytest.approx(rest.cost(schemes).d_nats, abs=1e-9)


class Picky(Exporter):
    """Takes even widths; 8 bits in no groups."""

    name, suffix = "picky", ".x"

    def refuse(self, decision: Decision) -> str | None:
        scheme = decision.scheme
        assert scheme is not None
        return "no" if scheme.bits % 2 or (scheme.bits == 8 and scheme.group_size) else None

    def write(self, *_: Any) -> None:
        raise NotImplementedError

    def open(self, *_: Any) -> Any:
        raise NotImplementedError


def test_only_what_every_runtime_holds(tiny: nn.Module) -> None:
    plan = Recipe.load("int8-dynamic-int4-weight").match(tiny)
    weights = {w.names: w for w in stored_weights(plan)}

    def labels(*names: str, exporters: tuple[Exporter, ...] = (Picky(),)) -> list[str]:
        return [s[-1].label.split(" +")[0] for s in candidates(plan, weights[names], (3, 4, 8), exporters)]

    assert labels("blocks.0.up") == ["int4 g32", "int8 channel"]
    # 40 weights in a row: no groups of 32.
    assert labels("blocks.0.down") == ["int4 channel", "int8 channel"]
    assert labels("embed", "head") == ["int4 g32", "int8 channel"]
    assert labels("blocks.0.up", exporters=()) == ["int3 g32", "int4 g32", "int8 g32"]


def test_levels_go_only_with_their_widths(tiny: nn.Module) -> None:
    scheme = {"bits": 2, "group_size": 32, "levels": "ternary"}
    plan = Recipe.from_dict({"rules": [{"name": "blocks.0.up", "scheme": scheme}]}).match(tiny)
    (weight,) = stored_weights(plan)
    levels = [(s.bits, s.levels) for (s,) in candidates(plan, weight, (2, 4), ())]
    assert levels == [(2, "ternary"), (4, "all")]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("1bpw", r"1bpw is out of reach; the smallest .* is 2\.\d+bpw"),
        ("bytes=100", r"bytes=100 is out of reach; the smallest .* is bytes=\d+, with scales and what stays"),
        ("d_nats=1e-9", r"d_nats=1e-09 is out of reach; the least .* measures is 0\.\d+"),
    ],
)
def test_a_budget_out_of_reach_names_what_is_in_reach(
    budget: str, message: str, tiny: nn.Module, task: LanguageTask
) -> None:
    with pytest.raises(QawareError, match=message):
        searched(tiny, task, budget, widths=(2, 3), method="estimate")


@pytest.mark.parametrize("text", ["4.5", "bpw", "-1bpw", "size=3", "bytes=", "d_nats=nan", "infbpw"])
def test_budgets_of_another_form(text: str) -> None:
    with pytest.raises(QawareError, match=r"budget: .* is not one of 4.5bpw"):
        Budget.parse(text)


def test_other_mistakes(tiny: nn.Module, task: LanguageTask) -> None:
    assert parse_widths("8,3,4") == (3, 4, 8)
    with pytest.raises(QawareError, match="bits: 'four'"):
        parse_widths("four")
    with pytest.raises(QawareError, match=r"bits: .*9.* must be widths from 1 to 8"):
        Settings(Budget.parse("4bpw"), (9,))
    with pytest.raises(QawareError, match="picky holds none of them for any layer of recipe 'base'"):
        searched(tiny, task, "4bpw", widths=(3,), exporters=[Picky()])
    nothing = Recipe.from_dict({"rules": [{"type": "Conv2d", "scheme": {"bits": 8}}]}).match(tiny)
    with pytest.raises(QawareError, match="quantizes nothing"):
        Search(tiny, nothing, task, head(task, 2), Settings(Budget.parse("4bpw")))


def test_from_a_module_and_its_loader(tiny: Any, loader: Any) -> None:
    found = qaware.search(tiny, BASE, loader, "4bpw", bits=(2, 4), method="estimate", windows=4, name="mine")
    assert found.recipe.name == "mine"
    assert found.point.bpw <= 4
