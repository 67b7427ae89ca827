"""Recipe: where it comes from, what is refused and in which words, its hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch import nn

from qaware.errors import QawareError
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme
from qaware.shipped import recipe_names

INT4 = Scheme(4, 32)


@pytest.mark.parametrize("name", recipe_names())
def test_every_named_recipe_loads_says_what_it_does_and_round_trips(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    again = Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict())))
    assert again == recipe
    assert again.hash == recipe.hash
    assert Recipe.load(recipe) is recipe


def test_named_recipes_are_the_files_of_the_folder_and_all_different() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    assert recipe_names() == sorted(p.stem for p in folder.glob("*.yaml"))
    assert len({Recipe.load(n).hash for n in recipe_names()}) == len(recipe_names())


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "rules:\n  - {role: head, scheme: null}\n  - {type: Linear, scheme: {bits: 4, group_size: 32}}\n"
    )
    recipe = Recipe.load(path)
    assert recipe == Recipe.load(str(path))
    assert recipe == Recipe("mine", (Rule(None, role="head"), Rule(INT4, type="Linear")))


def test_from_plain_data_with_built_rules_in_it() -> None:
    recipe = Recipe.load({"rules": [Rule(INT4, name="*"), {"name": "*", "scheme": INT4}, {"name": "x"}]})
    assert recipe.rules == (Rule(INT4, name="*"), Rule(INT4, name="*"), Rule(None, name="x"))
    assert recipe.name == "custom"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("int8-dynamc", "did you mean 'int8-dynamic'?"),
        ("", "is not known"),
        (None, "recipe: None must be a name"),
        (5, "recipe: 5 must be a name"),
        (["int8-dynamic"], "recipe: ['int8-dynamic'] must be a name"),
        ({}, "has none, so nothing would be quantized"),
        ({"rules": None}, "has none"),
        ({"rules": "Linear"}, "rules: 'Linear' must be a list"),
        ({"rules": 3}, "rules: 3 must be a list"),
        ({"rules": ["Linear"]}, "rules[0]: 'Linear' must be a mapping"),
        ({"rules": {"type": "Linear"}}, "rules[0]: 'type' must be a mapping"),
        ({"rule": []}, "recipe: unknown key 'rule'; did you mean 'rules'?"),
        ({1: 2}, "recipe: unknown key 1"),
        ({"rules": [{"tipe": "Linear"}]}, "rule: unknown key 'tipe'; did you mean 'type'?"),
        ({"rules": [{"scheme": {"bits": 4}}]}, "give at least one of role, type, name"),
        ({"rules": [{}]}, "give at least one of role, type, name"),
        ({"rules": [{"role": "neck"}]}, "role: 'neck' is not one of embedding, attention"),
        ({"rules": [{"role": ["head"]}]}, "role: ['head']"),
        ({"rules": [{"name": 5}]}, "name: 5 must be text"),
        ({"rules": [{"type": True}]}, "type: True must be text"),
        ({"rules": [{"name": "*", "scheme": 4}]}, "scheme: 4 must be a mapping such as"),
        ({"rules": [{"name": "*", "scheme": "int4"}]}, "scheme: 'int4' must be"),
        ({"rules": [{"name": "*", "scheme": {"group_size": 32}}]}, "has no bits"),
        ({"rules": [{"name": "*", "scheme": {"bit": 4}}]}, "scheme: unknown key 'bit'; did you mean 'bits'?"),
        ({"rules": [{"name": "*", "scheme": {"bits": 12}}]}, "bits: 12"),
        ({"rules": [{"name": "*"}], "rounding": "gtpq"}, "rounding: 'gtpq' is not one of rtn, mse"),
        ({"rules": [{"name": "*"}], "name": ""}, "name: '' must be letters"),
        ({"rules": [{"name": "*"}], "name": 7}, "name: 7 must be letters"),
        ({"rules": [{"name": "*"}], "description": 5}, "description: 5 must be text"),
    ],
)
def test_a_bad_source_is_refused_with_the_way_out(source: object, words: str) -> None:
    with pytest.raises(QawareError) as caught:
        Recipe.load(source)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file"),
        (b"rules: [", "is not valid YAML"),
        (b"\xff\xfe\xff", "is not valid YAML"),
        (b"", "expected a mapping with 'rules', got NoneType"),
        (b"- a\n- b\n", "expected a mapping with 'rules', got list"),
        (b"rules: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QawareError) as caught:
        Recipe.load(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(QawareError, match="cannot be read"):
        Recipe.load(tmp_path / "folder.yaml")


def test_the_hash_follows_what_a_recipe_does_only() -> None:
    base = Recipe("a", (Rule(INT4, type="Linear"),))
    same = Recipe(
        "b", (Rule(Scheme(bits=4, group_size=32, symmetric=True), type="Linear"),), description="text"
    )
    assert base.hash == same.hash
    others = [
        Recipe("a", (Rule(Scheme(4, 64), type="Linear"),)),
        Recipe("a", (Rule(INT4, name="Linear"),)),
        Recipe("a", (Rule(None, type="Linear"),)),
        Recipe("a", (Rule(INT4, type="Linear"), Rule(None, role="head"))),
        Recipe("a", (Rule(None, role="head"), Rule(INT4, type="Linear"))),
    ]
    assert len({r.hash for r in [base, *others]}) == 6


def test_the_hash_is_stable_across_versions() -> None:
    # Checkpoints carry it: a change here makes every earlier checkpoint look like another recipe.
    recipe = Recipe.from_dict(
        {"rules": [{"role": "head", "scheme": None}, {"type": "Linear", "scheme": {"bits": 4}}]}
    )
    assert recipe.hash == "4989f1528de7f08f"


def test_prepended_rules_win() -> None:
    recipe = Recipe.load("int8-weight-only").prepend(Rule(INT4, name="1"))
    plan = recipe.match(nn.Sequential(nn.Linear(32, 8), nn.Linear(32, 8)))
    assert recipe.name == "int8-weight-only+"
    assert plan.layer("0").scheme == Scheme(8)
    assert plan.layer("1").scheme == INT4


def test_label_of_a_rule() -> None:
    assert Rule(None, role="head", type="Linear", name="*.x").label == "role=head type=Linear name=*.x"


def test_learning_and_blocks_are_kept_and_change_the_hash_only_where_they_are_used() -> None:
    plain = {"name": "r", "rules": [{"type": "Linear", "scheme": {"bits": 4}}]}
    made = Recipe.from_dict({**plain, "learning": "lsq"})
    assert Recipe.from_dict(made.to_dict()) == made
    assert "learning" not in Recipe.from_dict(plain).to_dict()
    assert Recipe.from_dict({**plain, "learning": "none"}).hash == Recipe.from_dict(plain).hash != made.hash
    blocks = Recipe.from_dict({"rules": [{"blocks": [0, -1], "scheme": {"bits": 8}}]})
    assert blocks.rules[0].label == "blocks=0,-1"
    assert Recipe.from_dict(blocks.to_dict()) == blocks
    with pytest.raises(QawareError, match=r"^learning: 'all' is not one of none, lsq, range$"):
        Recipe.from_dict({**plain, "learning": "all"})


@pytest.mark.parametrize("blocks", [[], 0, "first", [True], [0.5]])
def test_blocks_are_whole_numbers(blocks: object) -> None:
    with pytest.raises(QawareError, match=r"^blocks: .* must be a list of whole numbers, e\.g\. \[0, -1\]$"):
        Recipe.from_dict({"rules": [{"blocks": blocks, "type": "Linear"}]})


def test_the_hash_of_a_shipped_recipe_stays() -> None:
    """Checkpoints of earlier versions hold it."""
    assert Recipe.load("int8-dynamic-int4-weight").hash == "d084eb88499fd89a"
