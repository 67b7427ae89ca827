"""Find a scheme for each layer: the least divergence from the float model within a budget.

What each layer costs at each width is measured by itself, KL(float || quantized) on the same windows, and the
sum is made as small as the budget allows. KL rather than the difference in nats, which is the same on average
where a model fits its data, but has much less noise: at 6 bits the noise of a difference is larger than the
difference. Costs of several layers do not really add up, so what was found is quantized and measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from qaware.errors import QawareError
from qaware.exporters.base import Exporter
from qaware.metrics.score import Score, paired
from qaware.mixed.budget import Budget
from qaware.mixed.candidates import WIDTHS
from qaware.mixed.choices import open_choices, require_room
from qaware.mixed.found import Found, Point, describe
from qaware.mixed.knapsack import Knapsack, Option
from qaware.mixed.prices import Price, prices_of
from qaware.mixed.rules import merged_recipe
from qaware.mixed.trial import Cost, Source, Trials
from qaware.mixed.weights import assigned
from qaware.pipeline import Progress, no_progress
from qaware.plan import Plan
from qaware.scheme import Scheme
from qaware.tasks import Task

POINTS = 48
"""Recipes of the frontier."""
_SHOWN = 6
"""Of which so many are measured, for the plot."""


@dataclass(frozen=True)
class Settings:
    """What is searched, apart from model and data."""

    budget: Budget
    widths: Sequence[int] = WIDTHS
    exporters: Sequence[Exporter] = ()
    """Runtimes that have to hold every scheme."""
    method: str = "exact"
    """``exact``, each layer measured at each width, or ``estimate``, from gradients."""
    name: str = "mixed"
    """Of the recipe."""
    seed: int = 0
    """Goes into the description; the search itself draws no random numbers."""
    source: Source = field(default_factory=Source)
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        if self.method not in ("exact", "estimate"):
            raise QawareError(f"method: {self.method!r} is not one of exact, estimate")
        if not self.widths or any(not isinstance(b, int) or not 1 <= b <= 8 for b in self.widths):
            raise QawareError(f"bits: {list(self.widths)} must be widths from 1 to 8, e.g. 3,4,8")


Picks = tuple[int, ...]
"""For each stored weight the index of its choice."""


class Search:
    """One search: of a model, for a budget."""

    def __init__(self, model: nn.Module, plan: Plan, task: Task, part: Task, settings: Settings) -> None:
        """
        Args:
            model: float; changed while it is measured, afterwards as before.
            plan: of the base recipe, made for it.
            task: what the found recipe is measured on.
            part: the windows or batches, from its first on, that the choice is made on.
            settings: see there.

        Raises:
            QawareError: nothing to quantize, or a budget that no recipe meets, however it scores.
        """
        self.plan, self.settings, self._part = plan, settings, part
        self.weights, self.choices = open_choices(plan, settings.budget, settings.widths, settings.exporters)
        self.numel = sum(weight.numel for weight in self.weights)
        self.trials = Trials(model, plan, task, settings.source)
        self.rest = self._rest()
        require_room(settings.budget, self.weights, self.choices, self.rest)
        self._measured: dict[Picks, tuple[Cost, Score]] = {}

    def run(self) -> Found:
        """Measure, choose, verify.

        Raises:
            QawareError: no recipe loses as little as ``d_nats``; names the least that one does.
        """
        part = self.trials.on(self._part)
        prices = prices_of(part, self.weights, self.choices, self.settings.method, self.settings.progress)
        knapsack = Knapsack([[Option(p.bytes, p.cost) for p in line] for line in prices])
        frontier = [_require(knapsack.best(b)) for b in knapsack.budgets(POINTS)]
        picks = self._choose(knapsack, frontier)
        shown = [frontier[round(i * (len(frontier) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
        uniform = [p for bits in self.settings.widths if (p := self._uniform(bits)) is not None]
        with self.settings.progress("Frontier", len(shown) + len(uniform) + 1) as advance:
            for one in (picks, *shown, *uniform):
                self._measure(one)
                advance()
        point = self._point(picks, prices)
        plan = assigned(self.plan, self._schemes(picks))
        return Found(
            merged_recipe(
                plan, self.settings.name, describe(self.settings.budget, self.settings.seed, point)
            ),
            point,
            self._held_out(self._measure(picks)[1], len(part.float_score.losses)),
            tuple(self._point(p, prices) for p in frontier),
            tuple(self._point(p, prices) for p in uniform),
            tuple(zip((weight.names for weight in self.weights), map(tuple, prices), strict=True)),
        )

    def _choose(self, knapsack: Knapsack, frontier: Sequence[Picks]) -> Picks:
        budget = self.settings.budget
        if budget.kind != "d_nats":
            return _require(knapsack.best(budget.packed(self.numel, self.rest)))
        return self._smallest(frontier, budget.value)

    def _smallest(self, frontier: Sequence[Picks], target: float) -> Picks:
        """The first of the frontier, by bisection, that measures at most ``target``; costs that were measured
        need not fall all the way, so the step that it ends on may be followed by a few more."""
        low, high = 0, len(frontier) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self._measure(frontier[middle])[0].d_nats <= target
            low, high = (low, middle) if fits else (middle + 1, high)
        for picks in frontier[low:]:
            if self._measure(picks)[0].d_nats <= target:
                return picks
        least = min(self._measure(picks)[0].d_nats for picks in frontier[low:])
        raise QawareError(
            f"budget: d_nats={target:g} is out of reach; the least that a recipe of these widths measures is "
            f"{least:.4f}, so allow that, or more bits than {max(self.settings.widths)}"
        )

    def _rest(self) -> int:
        """Bytes of what is not quantized, from a conversion: what is folded away does not count."""
        smallest = tuple(0 for _ in self.weights)
        return self.trials.convert(self._schemes(smallest)).bytes - self._packed(smallest)

    def _uniform(self, bits: int) -> Picks | None:
        """One width for all, as far as all hold it."""
        picks = [
            next((i for i, s in enumerate(choices) if s[0].bits == bits), -1) for choices in self.choices
        ]
        return None if -1 in picks else tuple(picks)

    def _schemes(self, picks: Picks) -> dict[str, Scheme]:
        lines = zip(self.weights, self.choices, picks, strict=True)
        return {name: s for w, c, i in lines for name, s in zip(w.names, c[i], strict=True)}

    def _packed(self, picks: Picks) -> int:
        return sum(w.bytes(c[i]) for w, c, i in zip(self.weights, self.choices, picks, strict=True))

    def _measure(self, picks: Picks) -> tuple[Cost, Score]:
        if picks not in self._measured:
            score = self.trials.score(self._schemes(picks))
            self._measured[picks] = self.trials.compare(score), score
        return self._measured[picks]

    def _point(self, picks: Picks, prices: Sequence[Sequence[Price]]) -> Point:
        packed = self._packed(picks)
        measured = self._measured.get(picks)
        return Point(
            tuple(c[i][0].bits for c, i in zip(self.choices, picks, strict=True)),
            8 * packed / self.numel,
            packed + self.rest,
            sum(line[i].cost for line, i in zip(prices, picks, strict=True)),
            None if measured is None else measured[0],
        )

    def _held_out(self, score: Score, used: int) -> tuple[float, float] | None:
        """Of the windows that the choice was not made on."""
        if len(score.losses) - used < 2:
            return None
        pair = (score, self.trials.float_score)
        late = [dataclasses.replace(s, losses=s.losses[used:], counts=s.counts[used:]) for s in pair]
        return paired(*late)


def _require(picks: list[int] | None) -> Picks:
    assert picks is not None  # the budget was checked
    return tuple(picks)
