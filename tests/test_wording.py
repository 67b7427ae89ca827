"""One layer, two layers."""

from __future__ import annotations

from qaware.wording import counted


def test_counts() -> None:
    counts = [counted(count, "linear layer") for count in (0, 1, 2, 1234)]
    assert counts == ["0 linear layers", "1 linear layer", "2 linear layers", "1,234 linear layers"]
