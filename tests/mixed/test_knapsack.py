"""The best choice within a budget, against all combinations."""

from __future__ import annotations

import itertools
import random

import pytest

from qaware.mixed import knapsack as module
from qaware.mixed.knapsack import Knapsack, Option


def random_options(seed: int, unit: int = 4) -> list[list[Option]]:
    draw = random.Random(seed)
    return [
        [Option(unit * draw.randint(1, 30), draw.uniform(-0.05, 1.0)) for _ in range(draw.randint(1, 4))]
        for _ in range(5)
    ]


def total(options: list[list[Option]], picks: tuple[int, ...] | list[int]) -> tuple[int, float]:
    chosen = [layer[i] for layer, i in zip(options, picks, strict=True)]
    return sum(o.bytes for o in chosen), sum(o.cost for o in chosen)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_of_all_combinations(seed: int) -> None:
    options = random_options(seed)
    knapsack = Knapsack(options)
    everything = [total(options, p) for p in itertools.product(*(range(len(layer)) for layer in options))]
    for budget in range(knapsack.least, knapsack.most + 20, 7):
        picks = knapsack.best(budget)
        assert picks is not None
        size, cost = total(options, picks)
        assert size <= budget
        assert cost == pytest.approx(min(c for s, c in everything if s <= budget), abs=1e-12)


def test_nothing_fits_below_the_smallest() -> None:
    knapsack = Knapsack(random_options(0))
    assert knapsack.best(knapsack.least) is not None
    assert knapsack.best(knapsack.least - 1) is None


def test_of_equal_costs_the_smaller_wins() -> None:
    assert Knapsack([[Option(8, 1.0), Option(4, 1.0)]]).best(100) == [1]


def test_budgets_are_where_something_better_begins_to_fit() -> None:
    options = random_options(3)
    knapsack = Knapsack(options)
    budgets = knapsack.budgets(1000)
    assert budgets == sorted(budgets)
    costs = [total(options, knapsack.best(b) or [])[1] for b in budgets]
    assert all(later < earlier for earlier, later in itertools.pairwise(costs))
    assert total(options, knapsack.best(knapsack.most) or [])[1] == pytest.approx(costs[-1])
    thinned = knapsack.budgets(4)
    assert len(thinned) == 4
    assert {thinned[0], thinned[-1]} == {budgets[0], budgets[-1]}


def test_in_larger_units_a_budget_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    options = random_options(5, unit=1)
    monkeypatch.setattr(module, "_CELLS", 16)
    knapsack = Knapsack(options)
    for budget in range(knapsack.least, knapsack.most, 3):
        assert total(options, knapsack.best(budget) or [])[0] <= budget
