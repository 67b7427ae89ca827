"""Every step of a recipe has its code."""

from __future__ import annotations

from qaware.rounding.kinds import CHOOSERS, FOLDERS
from qaware.roundings import STEPS


def test_every_step_has_its_code() -> None:
    assert set(CHOOSERS) == {name for name, step in STEPS.items() if step.stage == 1}
    assert set(FOLDERS) == {name for name, step in STEPS.items() if step.stage == 0}
