"""Which engine a recipe gets, where it says something of rounding after training or of learned scales."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from qaware.engines.choose import choose
from qaware.errors import QawareError
from qaware.recipe import Recipe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.out = nn.Linear(8, 4)


def engine(training: bool, wanted: str = "auto", **given: Any) -> str:
    rules = [{"name": "*", "scheme": {"bits": 8, "activation": "int8-static"}}]
    plan = Recipe.from_dict({"name": "r", "rules": rules, **given}).match(Net())
    return choose(plan, Net(), ["executorch"], wanted, training).engine


def test_what_the_method_has_no_use_for_does_not_choose_the_engine() -> None:
    assert engine(training=False) == engine(training=True) == "graph"
    assert engine(training=False, learning="lsq") == "graph"
    assert engine(training=True, learning="lsq") == "eager"
    assert engine(training=True, rounding="mse") == "graph"
    assert engine(training=False, rounding="mse") == "eager"


def test_the_graph_engine_rounds_to_nearest_only() -> None:
    assert engine(training=True, wanted="graph", rounding="mse") == "graph"
    with pytest.raises(QawareError, match=r"^engine: 'graph' rounds to nearest only"):
        engine(training=False, wanted="graph", rounding="mse")
