"""Tolerance by name: the numbers, the gate, and that none is looser without a word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qaware.errors import ParityError, QawareError
from qaware.experiment import Quantize
from qaware.exporters.base import Tolerance
from qaware.parity import Parity, compare
from qaware.parity_levels import LEVELS, require_level

OWN = Tolerance(relative=1e-3, kl=1.0, reason="test")
NUMBERS = {
    "exact": (0, 0, 0),
    "close": (1e-7, 1e-7, 0),
    "approximate": (1e-4, 5e-4, 0),
    "very": (5e-2, 1e-2, 0),
    "super": (0.1, 0.05, 1e-4),
    "ultra": (0.2, 0.1, 5e-4),
}
"""Of tract's ``Approximation::atol_rtol_outliers``: absolute, relative, outliers."""


def parity(expected: Tensor, got: Tensor, level: str) -> Parity:
    return compare(lambda _: got, lambda _: expected, [(expected,)], level=level)


def test_the_numbers_are_tracts() -> None:
    assert {name: (v.atol, v.rtol, v.outliers) for name, v in LEVELS.items()} == NUMBERS


@pytest.mark.parametrize("level", NUMBERS)
def test_a_value_just_beyond_fails_and_just_within_passes(level: str) -> None:
    expected = torch.linspace(-4, 4, 100, dtype=torch.float64).view(10, 10)
    atol, rtol, _ = NUMBERS[level]
    edge = atol + rtol * expected[3, 3].abs()
    for factor, holds in ((0.9, True), (1.1, level == "exact")):
        got = expected.clone()
        got[3, 3] += factor * edge
        assert LEVELS[level].beyond(expected, got) == (0 if holds else 0.01)
    got = expected.clone()
    got[3, 3] += 1.0
    found = parity(expected, got, level)
    assert found.beyond == pytest.approx(0.01)
    assert not found.within(OWN)
    assert parity(expected, expected, level).within(OWN)


def test_a_share_of_outliers_is_allowed_where_the_level_says_so() -> None:
    expected = torch.zeros(100, 100)
    got = expected.clone()
    got[0, 0] = 100.0
    assert parity(expected, got, "super").within(OWN)
    assert not parity(expected, got, "very").within(OWN)
    got[0, 1] = 100.0
    assert not parity(expected, got, "super").within(OWN)
    assert parity(expected, got, "ultra").within(OWN)


def test_nan_is_never_near() -> None:
    expected = torch.zeros(2, 2)
    for level in LEVELS:
        assert parity(expected, expected + torch.nan, level).beyond == 1


def test_a_failure_names_the_level() -> None:
    expected = torch.arange(4.0).view(2, 2)
    words = (
        r"x: does not .*50\.00% of the values are more than 0\.0001 \+ 0\.0005 \* \|expected\| off, at most"
    )
    found = parity(expected, expected + torch.tensor([[0.1, 0.0], [0.1, 0.0]]), "approximate")
    with pytest.raises(ParityError, match=words) as caught:
        found.require("x", OWN)
    assert "0.00% allowed by parity: approximate; relative" in str(caught.value)


def test_a_stricter_level_has_nothing_to_tell_and_a_looser_one_has() -> None:
    expected = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    near, far = (parity(expected, expected + by, "very") for by in (1e-5, 0.02))
    assert near.within(OWN)
    assert near.looser(OWN) is None
    assert far.within(OWN)
    assert "parity: very is looser than this runtime's own tolerance, which is missed" in str(far.looser(OWN))
    beyond = parity(expected, expected + 1, "very")
    assert beyond.looser(OWN) is None  # fails anyway
    assert parity(expected, expected + 0.02, "default").looser(OWN) is None


def test_names() -> None:
    assert [require_level(name) for name in ("default", *LEVELS)] == ["default", *LEVELS]
    for wrong in ("loose", None, 1e-3, "Exact"):
        with pytest.raises(
            QawareError, match=r"^parity: .* is not one of default, exact, close, approximate"
        ):
            require_level(wrong)
    assert Quantize("float16").parity == "default"
