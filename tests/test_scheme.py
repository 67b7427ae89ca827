"""Scheme: what is legal, what is said about the rest, and the derived forms."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from qaware.errors import QawareError
from qaware.scheme import ACTIVATIONS, SCALE_DTYPES, Scheme


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 0}, "bits: 0"),
        ({"bits": 9}, "use 1 to 8, or 16"),
        ({"bits": 15}, "bits: 15"),
        ({"bits": -4}, "bits: -4"),
        ({"bits": 4.0}, "bits: 4.0"),
        ({"bits": "4"}, "bits: '4'"),
        ({"bits": True}, "bits: True"),
        ({"bits": None}, "bits: None"),
        ({"bits": 4, "group_size": -32}, "group_size: -32"),
        ({"bits": 4, "group_size": 1}, "group_size: 1"),
        ({"bits": 4, "group_size": 32.0}, "group_size: 32.0"),
        ({"bits": 4, "group_size": True}, "group_size: True"),
        ({"bits": 4, "group_size": None}, "group_size: None"),
        (
            {"bits": 4, "activation": "int8"},
            "activation: 'int8' is not one of none, int8-dynamic, int8-static",
        ),
        ({"bits": 4, "activation": None}, "activation: None"),
        ({"bits": 4, "activation": ["none"]}, "activation: "),
        ({"bits": 4, "scale_dtype": "float64"}, "scale_dtype: 'float64'"),
        ({"bits": 4, "symmetric": 1}, "symmetric: 1 must be true or false"),
        ({"bits": 4, "symmetric": "false"}, "symmetric: 'false'"),
        (
            {"bits": 8, "observer": "median"},
            "observer: 'median' is not one of minmax, moving-average, histogram",
        ),
        ({"bits": 8, "observer": None}, "observer: None"),
        ({"bits": 8, "observer": "histogram"}, "activation is 'none', use int8-static"),
        ({"bits": 8, "activation": "int8-dynamic", "observer": "histogram"}, "activation is 'int8-dynamic'"),
        ({"bits": 16, "observer": "histogram"}, "observer: 'histogram' calibrates a static activation"),
        ({"bits": 16, "group_size": 32}, "bits: 16 is float16"),
        ({"bits": 16, "activation": "int8-dynamic"}, "bits: 16 is float16"),
        ({"bits": 16, "symmetric": False}, "bits: 16 is float16"),
        ({"bits": 16, "scale_dtype": "bfloat16"}, "bits: 16 is float16"),
    ],
)
def test_an_illegal_value_is_named(fields: dict, words: str) -> None:
    with pytest.raises(QawareError) as caught:
        Scheme(**fields)
    assert words in str(caught.value)


def test_every_legal_combination_can_be_made_and_read_back() -> None:
    for bits in range(1, 9):
        for group in (0, 2, 32):
            for activation in ACTIVATIONS:
                for dtype in SCALE_DTYPES:
                    for symmetric in (True, False):
                        scheme = Scheme(bits, group, activation, symmetric, dtype)
                        assert Scheme(**scheme.to_dict()) == scheme
    assert Scheme(**Scheme(16).to_dict()) == Scheme(16)


def test_a_scheme_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme(4).bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bits", "low", "high"), [(1, -1, 0), (2, -2, 1), (3, -4, 3), (4, -8, 7), (7, -64, 63), (8, -128, 127)]
)
def test_the_range_is_that_of_twos_complement(bits: int, low: int, high: int) -> None:
    assert Scheme(bits).range == (low, high)


def test_to_dict_leaves_defaults_out_but_never_bits() -> None:
    assert Scheme(4).to_dict() == {"bits": 4}
    scheme = Scheme(4, 32, "int8-dynamic", False, "bfloat16")
    assert scheme.to_dict() == {
        "bits": 4,
        "group_size": 32,
        "activation": "int8-dynamic",
        "symmetric": False,
        "scale_dtype": "bfloat16",
    }
    assert "observer" not in Scheme(8, activation="int8-static").to_dict()
    histogram = Scheme(8, activation="int8-static", observer="histogram")
    assert histogram.to_dict()["observer"] == "histogram"
    assert Scheme(**histogram.to_dict()) == histogram


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (Scheme(8), "int8 channel"),
        (Scheme(4, 32), "int4 g32"),
        (Scheme(4, 32, "int8-dynamic", scale_dtype="bfloat16"), "int4 g32 + int8-dynamic"),
        (Scheme(2, 8, "int8-static", symmetric=False), "int2 g8 asym + int8-static"),
        (Scheme(8, activation="int8-static", observer="histogram"), "int8 channel + int8-static histogram"),
        (Scheme(16), "float16"),
    ],
)
def test_label(scheme: Scheme, label: str) -> None:
    assert scheme.label == label


def test_weight_drops_the_activation_only() -> None:
    scheme = Scheme(4, 32, "int8-static", False, "float16", "histogram")
    assert scheme.weight == Scheme(4, 32, "none", False, "float16")
    assert scheme.weight.weight == scheme.weight


def test_block_is_the_group_or_the_whole_row() -> None:
    assert Scheme(4, 32).block(172) == 32
    assert Scheme(4).block(172) == 172


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, qaware.scheme, qaware.recipe, qaware.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("fields", "integers", "stored", "label"),
    [
        ({"bits": 2, "levels": "ternary", "group_size": 32}, (-1, 1), 2, "ternary g32"),
        ({"bits": 1, "levels": "stretched"}, (-1, 1), 2, "int1 stretched channel"),
        ({"bits": 2, "levels": "stretched"}, (-3, 3), 3, "int2 stretched channel"),
        ({"bits": 3, "levels": "stretched"}, (-7, 7), 4, "int3 stretched channel"),
        ({"bits": 3}, (-4, 3), 3, "int3 channel"),
    ],
)
def test_levels(fields: dict, integers: tuple[int, int], stored: int, label: str) -> None:
    scheme = Scheme(**fields)
    assert (scheme.range, scheme.stored_bits, scheme.label) == (integers, stored, label)
    assert scheme.to_dict() == fields
    assert scheme.weight.levels == scheme.levels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 2, "levels": "binary"}, "levels: 'binary' is not one of all, ternary, stretched"),
        (
            {"bits": 4, "levels": "stretched"},
            "levels: 'stretched' is for bits: 1 or 2 or 3, not 4; leave levels",
        ),
        ({"bits": 3, "levels": "ternary"}, "levels: 'ternary' is for bits: 2, not 3; leave levels out"),
        ({"bits": 16, "levels": "ternary"}, "levels: 'ternary' is for bits: 2, not 16; leave levels out"),
        (
            {"bits": 2, "levels": "ternary", "symmetric": False},
            "levels: 'ternary' has no zero point; use symm",
        ),
    ],
)
def test_illegal_levels_say_what_is_legal(fields: dict, message: str) -> None:
    with pytest.raises(QawareError, match=f"^{re.escape(message)}"):
        Scheme(**fields)
