"""A recipe of few rules that says exactly what a plan does."""

from __future__ import annotations

import pytest
from torch import nn

from qaware.errors import QawareError
from qaware.mixed.rules import merged_recipe, patterns
from qaware.mixed.weights import assigned
from qaware.recipe import Recipe
from qaware.scheme import Scheme

BASE = Recipe.from_dict({"name": "base", "rules": [{"type": "Linear", "scheme": {"bits": 4}}]})


class Net(nn.Module):
    def __init__(self, blocks: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(blocks)
        )
        self.head = nn.Linear(8, 8)


def recipe_for(model: nn.Module, bits: dict[str, int]) -> Recipe:
    plan = assigned(BASE.match(model), {name: Scheme(b) for name, b in bits.items()})
    recipe = merged_recipe(plan, "merged", "words")
    got = {name: d.scheme.bits for name, d in recipe.match(model).quantized.items() if d.scheme}
    assert got == bits
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    return recipe


def every(model: nn.Module, bits: int = 4) -> dict[str, int]:
    return {name: bits for name, module in model.named_modules() if type(module) is nn.Linear}


def test_one_scheme_is_one_rule() -> None:
    recipe = recipe_for(Net(), every(Net()))
    assert [rule.label for rule in recipe.rules] == ["type=Linear"]
    assert (recipe.name, recipe.description) == ("merged", "words")


def test_names_come_before_types_and_exceptions_before_names() -> None:
    bits = every(Net())
    bits |= {name: 8 for name in bits if name.endswith("down")}
    bits |= {"layers.3.up": 3, "layers.5.up": 3, "layers.11.down": 6, "head": 4, "layers.0.up": 4}
    bits |= {"layers.1.down": 4}
    labels = [rule.label for rule in recipe_for(Net(), bits).rules]
    assert labels[-2:] == ["name=*.down", "type=Linear"]
    assert set(labels[:-2]) == {"name=layers.[35].up", "name=layers.11.down", "name=layers.1.down"}


def test_what_stays_float_is_not_caught() -> None:
    bits = every(Net())
    del bits["layers.0.up"]
    recipe = recipe_for(Net(), bits)
    assert recipe.rules[0].scheme is None
    assert recipe.rules[0].name == "layers.0.up"


def test_a_name_that_looks_like_a_pattern() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "a0": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    recipe_for(model, {"a[0]": 4, "a0": 8, "b": 4})


def test_the_rest_of_the_recipe_stays() -> None:
    base = Recipe.from_dict({**BASE.to_dict(), "rounding": "mse"})
    recipe = merged_recipe(assigned(base.match(Net()), {"head": Scheme(8, 4)}), "m", "")
    assert recipe.rounding == "mse"
    assert Scheme(8, 4) in [rule.scheme for rule in recipe.rules]


def test_nothing_quantized_is_an_error() -> None:
    with pytest.raises(QawareError, match="every layer in float"):
        merged_recipe(assigned(BASE.match(Net()), {}), "m", "")


def test_patterns() -> None:
    assert patterns(["l.0.a", "l.2.a", "l.10.a"]) == ["l.[02].a", "l.10.a"]
    assert patterns(["l.1.a", "l.2.a", "l.3.a"]) == ["l.[1-3].a"]
    assert patterns(["l.12.a", "l.17.a", "head"]) == ["l.1[27].a", "head"]
