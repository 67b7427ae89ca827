"""The best choice for every layer within a budget: the multiple-choice knapsack, solved exactly.

Dynamic programming over bytes (Sinha and Zoltners 1979, "The Multiple-Choice Knapsack Problem", Operations
Research 27(3)), rather than a greedy walk on convex hulls: one table holds the best choice for every budget,
so the frontier comes with it, and no repair pass is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CELLS = 1 << 16
"""Budgets that are told apart at most."""


@dataclass(frozen=True)
class Option:
    """One choice for one layer."""

    bytes: int
    cost: float


class Knapsack:
    """The table for one list of options a layer.

    Bytes are counted in units of their greatest common divisor, for which the solution is the best there is;
    where that would need more than 65,536 units, in larger ones, rounded up, so that a budget always holds.
    """

    def __init__(self, options: Sequence[Sequence[Option]]) -> None:
        """
        Args:
            options: at least one for each layer.
        """
        self.options = options
        self.least = sum(min(o.bytes for o in layer) for layer in options)
        """Bytes of the smallest choice of all."""
        self.most = sum(max(o.bytes for o in layer) for layer in options)
        self._unit = self._find_unit()
        self._cells = sum(max(self._weights(layer)) for layer in options) + 1
        self._chosen: list[Tensor] = []
        self._costs = self._fill()

    def best(self, budget: int) -> list[int] | None:
        """The index of an option for each layer, with the least sum of costs in ``budget`` bytes; the fewest
        bytes of equal ones. None where nothing fits."""
        cell = min((budget - self.least) // self._unit, self._cells - 1)
        if cell < 0:
            return None
        picks = []
        for layer, chosen in zip(reversed(self.options), reversed(self._chosen), strict=True):
            pick = int(chosen[cell])
            picks.append(pick)
            cell -= self._weights(layer)[pick]
        return picks[::-1]

    def budgets(self, count: int) -> list[int]:
        """Up to ``count`` budgets, in bytes and rising, at each of which a better choice begins to fit."""
        better = [0, *(torch.nonzero(self._costs[1:] < self._costs[:-1]).flatten() + 1).tolist()]
        if len(better) > count:
            better = [better[round(i * (len(better) - 1) / (count - 1))] for i in range(count)]
        return [self.least + cell * self._unit for cell in better]

    def _fill(self) -> Tensor:
        """float64 (cells,): the least cost of each budget; what is chosen for it is kept layer by layer."""
        costs = torch.zeros(self._cells, dtype=torch.float64)
        for layer in self.options:
            best = torch.full_like(costs, math.inf)
            chosen = torch.zeros(self._cells, dtype=torch.int8)
            weights = self._weights(layer)
            for index in sorted(range(len(layer)), key=lambda i: weights[i]):
                shifted = torch.full_like(costs, math.inf)
                shifted[weights[index] :] = costs[: self._cells - weights[index]] + layer[index].cost
                better = shifted < best
                best[better], chosen[better] = shifted[better], index
            self._chosen.append(chosen)
            costs = best
        return costs

    def _find_unit(self) -> int:
        extra = [o.bytes - min(p.bytes for p in layer) for layer in self.options for o in layer]
        return max(math.gcd(*extra), -(-(self.most - self.least) // _CELLS), 1)

    def _weights(self, layer: Sequence[Option]) -> list[int]:
        """Units that each option needs beyond the layer's smallest."""
        least = min(o.bytes for o in layer)
        return [-(-(o.bytes - least) // self._unit) for o in layer]
