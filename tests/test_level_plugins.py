"""Sets of levels by name: registered, found in a package, what a scheme says of them, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from registered_levels import FP4, POWERS, SCHEMES
from torch import nn

import qaware
from qaware import level_plugins, plugins
from qaware.errors import QawareError
from qaware.hardware import hardware_notes
from qaware.level_plugins import find_levels, level_names
from qaware.recipe import Recipe
from qaware.scheme import Scheme


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level_plugins, "_sets", {})


def recipe(scheme: Scheme) -> Recipe:
    return Recipe.from_dict({"rules": [{"type": "Linear", "scheme": scheme.to_dict()}]})


def test_a_scheme_knows_its_integers() -> None:
    fp4, powers = SCHEMES
    assert (fp4.level_set, fp4.range, fp4.stored_bits, fp4.code_bits) == (FP4, (-12, 12), 5, 5)
    assert (powers.level_set, powers.range, powers.stored_bits, powers.code_bits) == (POWERS, (-8, 4), 4, 4)
    assert fp4.is_mirrored
    assert not powers.is_mirrored
    assert not fp4.is_evenly_spaced
    assert fp4.label == "test-fp4 g32"
    assert Scheme(4, 32, "int8-dynamic", levels="test-fp4").label == "test-fp4 g32 + int8-dynamic"


@pytest.mark.parametrize(
    ("lowest", "highest", "bits"),
    [(-1, 1, 2), (-2, 1, 2), (-8, 7, 4), (-8, 8, 5), (-3, 8, 5), (-9, 7, 5), (-127, 127, 8), (-1, 127, 8)],
)
def test_stored_bits_hold_both_ends(forgotten: None, lowest: int, highest: int, bits: int) -> None:
    qaware.register_levels("ends", (lowest, 0, highest))
    assert Scheme(2, levels="ends").stored_bits == bits


def test_what_comes_with_qaware_is_what_it_was() -> None:
    """Bits of files and mirrored ranges, and with them hashes of recipes that exist already."""
    for bits in range(1, 9):
        scheme = Scheme(bits)
        assert (scheme.level_set, scheme.stored_bits, scheme.code_bits) == (None, bits, bits)
        assert not scheme.is_mirrored
        assert scheme.is_evenly_spaced
    for bits in (1, 2, 3):
        scheme = Scheme(bits, levels="stretched")
        assert (scheme.stored_bits, scheme.code_bits, scheme.is_mirrored) == (bits + 1, bits, True)
    assert Recipe.load("int8-dynamic-int4-weight").hash == "d084eb88499fd89a"
    assert Recipe.load("ternary-weight").hash == "8f772543d38bb62e"


def test_a_recipe_goes_through_data_and_its_hash_is_of_the_numbers(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    qaware.register_levels("mine", POWERS)
    first = recipe(Scheme(3, 32, levels="mine"))
    assert Recipe.from_dict(first.to_dict()) == first
    assert first.to_dict()["rules"][0]["scheme"] == {"bits": 3, "group_size": 32, "levels": "mine"}
    monkeypatch.setattr(level_plugins, "_sets", {})
    qaware.register_levels("mine", (-7, -4, -2, -1, 0, 1, 2, 4))
    assert recipe(Scheme(3, 32, levels="mine")).hash != first.hash


def test_a_process_that_does_not_know_the_name_can_use_a_scheme_that_was_sent(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    qaware.register_levels("mine", POWERS)
    sent = pickle.dumps(Scheme(3, levels="mine"))
    monkeypatch.setattr(level_plugins, "_sets", {})
    assert pickle.loads(sent).level_set == POWERS
    assert copy.deepcopy(pickle.loads(sent)).range == (-8, 4)


def test_the_same_numbers_again_are_fine_and_others_are_not(forgotten: None) -> None:
    qaware.register_levels("mine", [-1, 0, 2])
    qaware.register_levels("mine", (-1, 0, 2))
    with pytest.raises(QawareError, match="'mine' has other numbers already"):
        qaware.register_levels("mine", (-1, 0, 3))
    assert find_levels("mine") == (-1, 0, 2)


@pytest.mark.parametrize(
    ("name", "integers", "words"),
    [
        ("ternary", (-1, 1), "'ternary' comes with qaware"),
        ("", (-1, 1), "'' must be a letter, then"),
        ("a b", (-1, 1), "'a b' must be a letter"),
        (5, (-1, 1), "5 must be a letter"),
        ("mine", 5, "'mine' is 5; give whole numbers"),
        ("mine", (), r"is \(\); give whole numbers, increasing"),
        ("mine", (-1.0, 1), "give whole numbers"),
        ("mine", (False, True), "give whole numbers"),
        ("mine", (1, -1), "give whole numbers, increasing"),
        ("mine", (-1, 0, 0, 1), "give whole numbers, increasing"),
        ("mine", (-128, 1), "goes from -128 to 1; kernels hold -127 to 127"),
        ("mine", (-1, 200), "goes from -1 to 200"),
        ("mine", (0, 1, 2), "goes from 0 to 2; weights of both signs need levels below and above zero"),
        ("mine", (-2, -1, 0), "weights of both signs"),
    ],
)
def test_other_sets_are_refused(forgotten: None, name: Any, integers: Any, words: str) -> None:
    with pytest.raises(QawareError, match=words):
        qaware.register_levels(name, integers)
    assert level_names() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "levels: 'test-fp4' is for bits: 4, not 3"),
        ({"bits": 8}, "levels: 'test-fp4' is for bits: 4, not 8"),
        ({"symmetric": False}, "levels: 'test-fp4' has no zero point; use symmetric: true"),
        (
            {"levels": "test-fp5"},
            r"'test-fp5' is not one of all, ternary, .*test-fp4.*qaware\.register_levels",
        ),
        ({"levels": ["all"]}, r"levels: \['all'\] is not one of"),
    ],
)
def test_a_scheme_that_the_set_is_not_for_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(QawareError, match=words):
        dataclasses.replace(SCHEMES[0], **change)
    with pytest.raises(QawareError, match="bits: 4, not 16"):
        Scheme(16, levels="test-fp4")


def test_where_a_set_is_fast_follows_from_its_integers() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    notes = []
    for scheme in SCHEMES:
        dynamic = dataclasses.replace(scheme, activation="int8-dynamic")
        notes.append(hardware_notes(recipe(dynamic).match(model)))
    assert "fast on ARM CPUs with torchao's low-bit kernels" in notes[0][0]
    assert notes[1] == [], "XNNPACK has kernels of 4 bits anywhere"


def test_a_package_may_have_one(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("packaged", f"{__name__}:POWERS", level_plugins.GROUP),
        EntryPoint("broken", "no_such_package:F", level_plugins.GROUP),
        EntryPoint("wrong", f"{__name__}:SCHEMES", level_plugins.GROUP),
        EntryPoint("ternary", f"{__name__}:POWERS", level_plugins.GROUP),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    assert level_names() == ["packaged", "broken", "wrong"]
    assert Scheme(3, levels="packaged").level_set == POWERS
    assert Scheme(2, levels="ternary").level_set is None, "what comes with qaware wins"
    with pytest.raises(QawareError, match="levels: 'broken' cannot be loaded from no_such_package:F"):
        Scheme(3, levels="broken")
    with pytest.raises(QawareError, match=r"levels: 'wrong' is .*; give whole numbers"):
        Scheme(3, levels="wrong")
    assert find_levels("other") is None
