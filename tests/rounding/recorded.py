"""Recordings for the tests of rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qaware.calibration import Look
from qaware.rounding.recording import Recording, record


def recorded(model: nn.Module, batches: list[Tensor], run: Callable[..., Any] | None = None) -> Recording:
    def run_pass(look: Look) -> None:
        for number, batch in enumerate(batches):
            look(True)
            (run or model)(batch)
            look.done(number, batch)

    return record(model, run_pass)
