"""Scores with known losses, for every test of the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qaware.metrics.score import Score, fingerprint_of, half_width

COUNTS = (10, 10, 10, 10)


def make_score(*losses: float, **changes: Any) -> Score:
    protocol = changes.pop("protocol", {"data": "d", "window": 11})
    fields: dict[str, Any] = {
        "nats": sum(losses) / sum(COUNTS),
        "perplexity": 3.0,
        "bits_per_byte": None,
        "accuracy": None,
        "kl": None,
        "top1": None,
        "ci95": half_width(losses, COUNTS),
        "count": sum(COUNTS),
        "seconds": 1.0,
        "fingerprint": fingerprint_of(protocol),
        "protocol": protocol,
        "losses": losses,
        "counts": COUNTS,
        "extra": {},
    }
    return Score(**(fields | changes))


@pytest.fixture
def score() -> Callable[..., Score]:
    return make_score
