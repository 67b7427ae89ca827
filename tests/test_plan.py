"""What a plan says of itself."""

from __future__ import annotations

import pytest
from torch import nn

from qaware.errors import QawareError
from qaware.plan import Plan, indivisible, nearest_groups, unfit
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme


def plan(*rules: Rule) -> Plan:
    net = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 172))
    return Recipe("r", rules).match(net)


def test_nearest_groups() -> None:
    assert nearest_groups(172, 32)[:3] == [43, 86, 172]
    assert nearest_groups(64, 32) == [32, 16, 64, 8, 4, 2]
    assert nearest_groups(1, 32) == []
    assert all(172 % g == 0 for g in nearest_groups(172, 5))


def test_indivisible() -> None:
    assert indivisible(None, 7) is None
    assert indivisible(Scheme(4), 7) is None
    assert indivisible(Scheme(4, 7), 14) is None
    assert indivisible(Scheme(4, 14), 7) == "group_size 14 does not divide its 7 input weights"


def test_a_token_of_one_number_has_no_range() -> None:
    dynamic = Scheme(8, activation="int8-dynamic")
    made = Recipe("r", (Rule(dynamic, type="Linear"),)).match(nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8)))
    assert [problem.module for problem in made.problems] == ["1"]
    with pytest.raises(
        QawareError, match=r"1: int8-dynamic measures a range for each .*; use activation: none$"
    ):
        made.require_possible()
    assert unfit(dynamic.weight, 1) is None


def test_needs_calibration_follows_the_layers_not_the_rules() -> None:
    static = Scheme(8, activation="int8-static")
    assert plan(Rule(static, type="Linear")).needs_calibration
    assert not plan(Rule(static, role="embedding")).needs_calibration


def test_width_and_size_of_a_decision() -> None:
    made = plan(Rule(Scheme(8), name="*"))
    assert (made.layer("1").width, made.layer("1").numel) == (32, 172 * 32)


def test_names_change_together() -> None:
    made = plan(Rule(Scheme(8), type="Linear")).renamed({"1": "head"})
    assert [d.parameter for d in made.decisions] == ["head.weight", "head.bias"]
    assert made.quantized.keys() == {"head"}
