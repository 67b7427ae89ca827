"""The phases of a fit follow from the step alone."""

from __future__ import annotations

import pytest

from qaware.callbacks.schedule import Schedule
from qaware.errors import QawareError


def test_rounding_begins_at_its_step_and_hardens_from_there() -> None:
    schedule = Schedule(start_step=10, anneal_steps=4)
    assert [schedule.rounds(step) for step in (0, 9, 10, 99)] == [False, False, True, True]
    assert [schedule.softness(step) for step in (10, 11, 13, 14)] == [1.0, 0.75, 0.25, 0.0]
    assert schedule.softness(99) == 0.0


def test_without_annealing_the_rounding_is_hard_at_once() -> None:
    assert Schedule(start_step=3).softness(3) == 0.0


@pytest.mark.parametrize(
    ("key", "step", "least"),
    [("start_step", -1, "0"), ("anneal_steps", -2, "0"), ("freeze_observers_step", 0, "at least 1")],
)
def test_an_impossible_step_is_refused(key: str, step: int, least: str) -> None:
    with pytest.raises(QawareError, match=f"{key}: {step} must be.*{least}"):
        Schedule(**{key: step})
