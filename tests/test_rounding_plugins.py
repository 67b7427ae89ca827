"""Rounding functions of users: registered, found in a package, and what of them is refused."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

import qaware
from qaware import plugins, rounding_plugins
from qaware.errors import QawareError
from qaware.recipe import Recipe
from qaware.rounding_plugins import find_step, function_of, registered_names
from qaware.roundings import parse_steps


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_plugins, "_functions", {})
    monkeypatch.setattr(rounding_plugins, "_steps", {})


def halved(weight: Any, grid: Any, *, factor: float = 0.5, rounds: int = 2, best: bool = False) -> Any:
    return None


def looking(weight: Any, grid: Any, *, moments: Any) -> Any:
    return None


def recipe(rounding: Any) -> Recipe:
    return Recipe.from_dict({"rounding": rounding, "rules": [{"name": "*", "scheme": {"bits": 4}}]})


def test_a_registered_function_is_a_step_with_its_arguments_as_options() -> None:
    qaware.register_rounding("halved", halved)
    made = recipe({"halved": {"factor": 0.25}})
    (step,) = made.steps
    assert (step.factor, step.rounds, step.best) == (0.25, 2, False)  # type: ignore[attr-defined]
    assert made.rounding_label == "halved factor=0.25"
    assert made.rounds
    assert not made.needs_data
    assert function_of("halved") is halved
    assert made.hash != recipe("halved").hash
    assert Recipe.from_dict(made.to_dict()) == made
    assert parse_steps(["awq", "halved"])[1].name == "halved"
    assert parse_steps({"halved": {"factor": 1}})


def test_moments_are_no_option_but_need_data() -> None:
    qaware.register_rounding("looking", looking)
    assert recipe("looking").needs_data
    with pytest.raises(QawareError, match="unknown option 'moments'"):
        recipe({"looking": {"moments": 1}})


def test_a_later_call_replaces_an_earlier_one() -> None:
    qaware.register_rounding("mine", halved)
    qaware.register_rounding("mine", looking)
    assert function_of("mine") is looking
    assert registered_names() == ["mine"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factor": "big"}, "rounding.halved.factor: 'big' must be float, e.g. 0.5"),
        ({"rounds": 1.5}, "rounding.halved.rounds: 1.5 must be int, e.g. 2"),
        ({"rounds": True}, "rounding.halved.rounds: True must be int"),
        ({"best": 1}, "rounding.halved.best: 1 must be bool, e.g. False"),
        ({"factr": 1.0}, "rounding.halved: unknown option 'factr'; did you mean 'factor'?"),
    ],
)
def test_an_option_of_another_kind_is_refused(options: dict[str, Any], words: str) -> None:
    qaware.register_rounding("halved", halved)
    with pytest.raises(QawareError) as caught:
        recipe({"halved": options})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("gptq", halved, "'gptq' comes with qaware; register yours by another name"),
        ("", halved, "'' must be text"),
        ("mine", 5, "'mine' is registered with 5; give a function"),
        ("mine", max, "'mine': no signature found for builtin .*; give a function of Python"),
        ("mine", lambda weight, grid, *, name="a": None, "has an option 'name', which every step has"),
        ("mine", lambda weight, grid, *, stage=1: None, "has an option 'stage', which every step has"),
        ("mine", lambda weight: None, r"must be function\(weight, grid, \*, option=default"),
        ("mine", lambda weight, grid, step: None, "must be function"),
        ("mine", lambda weight, grid, *, factor: None, "must be function"),
        ("mine", lambda weight, grid, *, factor=None: None, "must be function"),
    ],
)
def test_another_signature_is_refused(name: str, function: Any, words: str) -> None:
    with pytest.raises(QawareError, match=words):
        qaware.register_rounding(name, function)


def test_an_unknown_name_says_how_to_add_it() -> None:
    qaware.register_rounding("halved", halved)
    with pytest.raises(
        QawareError, match=r"'third' is not one of rtn, .*, halved; qaware\.register_rounding"
    ):
        recipe("third")


def test_a_package_may_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("packaged", f"{__name__}:halved", rounding_plugins.GROUP),
        EntryPoint("broken", "no_such_package:f", rounding_plugins.GROUP),
        EntryPoint("gptq", f"{__name__}:halved", rounding_plugins.GROUP),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    assert registered_names() == ["packaged", "broken"]
    assert recipe({"packaged": {"rounds": 3}}).rounding_label == "packaged rounds=3"
    with pytest.raises(QawareError, match="'broken' cannot be loaded from no_such_package:f"):
        recipe("broken")
    assert find_step("other") is None
    assert type(recipe("gptq").steps[0]).__name__ == "Gptq", "what comes with qaware wins"
