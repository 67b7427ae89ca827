"""Contenders take turns, round after round, so that a busy machine slows all of them down alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Block = Callable[[int], tuple[float, float]]
"""Runs a number of calls; gives the wall and the CPU seconds of one."""
MOST_CALLS = 400
_TICK = 1e-9
"""Of both clocks, in seconds."""


@dataclass
class Timing:
    """Seconds of a call, one figure for each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def seconds(self, clock: str) -> float:
        """The median of a clock, ``wall`` or ``cpu``."""
        values: list[float] = getattr(self, clock)
        return statistics.median(values)


@dataclass(frozen=True)
class Ratio:
    """How many times faster, from one figure for each round."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def interleaved(blocks: Mapping[str, Block], rounds: int, seconds: float) -> dict[str, Timing]:
    """Time each block for about ``seconds`` in each round.

    The first round only warms up and tells how many calls fill the time. Each following round starts one
    block later, so that nobody always comes after the same neighbour.
    """
    counts = {name: _calls(block(1)[0], seconds) for name, block in blocks.items()}
    timings = {name: Timing() for name in blocks}
    names = list(blocks)
    for turn in range(rounds):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            wall, cpu = blocks[name](counts[name])
            timings[name].wall.append(wall)
            timings[name].cpu.append(cpu)
    return timings


def speedup(faster: Timing, slower: Timing, clock: str) -> Ratio:
    """The median and the quartiles of slower / faster, round by round."""
    pairs = zip(getattr(slower, clock), getattr(faster, clock), strict=True)
    ratios = [a / max(b, _TICK) for a, b in pairs]
    if len(ratios) < 2:
        return Ratio(*ratios * 3)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(statistics.median(ratios), low, high)


def _calls(one: float, seconds: float) -> int:
    return max(1, min(MOST_CALLS, round(seconds / max(one, _TICK))))
