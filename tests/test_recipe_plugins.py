"""Recipes of other packages: by name, in the list, and what of them is refused."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

import qaware
from qaware import plugins
from qaware.cli import main
from qaware.errors import QawareError
from qaware.recipe import Recipe
from qaware.recipe_plugins import GROUP, packaged_names, read_packaged

RULES = [{"type": "Linear", "scheme": {"bits": 4, "group_size": 32}}]
AS_DATA = {"description": "from data", "rules": RULES}
AS_RECIPE = Recipe.from_dict({"name": "own-name", "description": "from Python", "rules": RULES})
AS_TORCHCHAT = {"linear:int8": {"groupsize": 0}}
NUMBER = 5


@pytest.fixture(autouse=True)
def packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"as-data": "AS_DATA", "as-recipe": "AS_RECIPE", "as-torchchat": "AS_TORCHCHAT"}
    named |= {"number": "NUMBER", "absent": "ABSENT", "float16": "AS_DATA"}
    entries = [EntryPoint(name, f"{__name__}:{target}", GROUP) for name, target in named.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == GROUP else [])


def test_a_recipe_is_loaded_by_its_name() -> None:
    assert Recipe.load("as-data").name == "as-data"
    assert Recipe.load("as-recipe") is AS_RECIPE
    assert Recipe.load("as-data").hash == AS_RECIPE.hash
    assert Recipe.load("as-torchchat").rules[-1].scheme is not None
    assert qaware.PostTrainingQuantization("as-data").recipe.description == "from data"


def test_what_comes_with_qaware_wins() -> None:
    assert Recipe.load("float16").description != "from data"
    assert "float16" not in packaged_names()


def test_an_unknown_name_is_compared_with_them_too() -> None:
    with pytest.raises(QawareError, match="did you mean 'as-recipe'"):
        Recipe.load("as-recpie")
    assert read_packaged("as-recpie") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", rf"recipe: 'number' is of type int \({__name__}:NUMBER\); give a qaware.Recipe or"),
        ("absent", f"recipe: 'absent' cannot be loaded from {__name__}:ABSENT"),
    ],
)
def test_something_else_is_refused(name: str, words: str) -> None:
    with pytest.raises(QawareError, match=words):
        Recipe.load(name)


def test_the_list_has_them_and_a_broken_one_hides_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    found = {line[0]: line[-1] for line in listed}
    assert found["as-data"] == "from data"
    assert found["as-recipe"] == "from Python"
    assert "cannot be loaded" in found["absent"]
    assert main(["recipes", "as-data"]) == 0
    assert "group_size: 32" in capsys.readouterr().out
