"""Turns, medians and ratios, on clocks that the tests set."""

from __future__ import annotations

import pytest

from benchmarks.timing import MOST_CALLS, Timing, interleaved, speedup


def test_everybody_has_a_turn_in_each_round_and_starts_in_turn() -> None:
    turns: list[str] = []

    def block(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def run(count: int) -> tuple[float, float]:
            turns.append(f"{name}{count}")
            return seconds, seconds / 2

        return run

    timings = interleaved({"a": block("a", 0.5), "b": block("b", 0.25)}, rounds=2, seconds=1.0)
    assert turns == ["a1", "b1", "a2", "b4", "b4", "a2"]
    assert timings["a"] == Timing([0.5, 0.5], [0.25, 0.25])


@pytest.mark.parametrize(("seconds", "calls"), [(10.0, 1), (0.0, MOST_CALLS)])
def test_a_block_is_never_empty_nor_endless(seconds: float, calls: int) -> None:
    counts: list[int] = []

    def run(count: int) -> tuple[float, float]:
        counts.append(count)
        return seconds, seconds

    interleaved({"a": run}, rounds=1, seconds=1.0)
    assert counts == [1, calls]


def test_a_ratio_is_taken_round_by_round() -> None:
    # The machine was three times slower in the second round, for both.
    fast, slow = Timing([1.0, 3.0, 1.0], [1.0] * 3), Timing([2.0, 6.0, 2.0], [5.0] * 3)
    found = speedup(fast, slow, "wall")
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
    assert str(speedup(fast, slow, "cpu")) == "5.00x (5.00 to 5.00)"


def test_a_single_round_has_no_spread() -> None:
    found = speedup(Timing([2.0], [0.0]), Timing([1.0], [1.0]), "wall")
    assert (found.low, found.median, found.high) == (0.5, 0.5, 0.5)
