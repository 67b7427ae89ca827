"""Weights that several layers share keep one set of integers, or are parted knowingly."""

from __future__ import annotations

from typing import Any

from rounded import net, recipe

from qaware.plan import Plan
from qaware.recipe import Recipe
from qaware.rounding.ties import find_ties, part_ties


def plan(model: Any, *rules: dict[str, Any]) -> Plan:
    return Recipe.from_dict({"name": "test", "rules": list(rules)}).match(model)


INT4 = {"bits": 4, "group_size": 16}


def test_the_layer_whose_input_says_something_leads() -> None:
    model = net(tie=True)
    assert find_ties(model, recipe("gptq").match(model)) == {"head": ("embed",)}


def test_no_tie_no_entry() -> None:
    model = net()
    made = recipe("gptq").match(model)
    assert find_ties(model, made) == {}
    assert part_ties(model, made) == {}


def test_the_same_scheme_stays_together() -> None:
    model = net(tie=True)
    assert part_ties(model, recipe("gptq").match(model)) == {}
    assert model.head.weight is model.embed.weight


def test_another_scheme_is_parted() -> None:
    model = net(tie=True)
    made = plan(model, {"role": "embedding", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": INT4})
    assert part_ties(model, made) == {"head": "embed"}
    assert model.head.weight is not model.embed.weight
    assert (model.head.weight == model.embed.weight).all()


def test_a_float_embedding_is_parted_from_its_head() -> None:
    model = net(tie=True)
    made = plan(model, {"type": "Linear", "scheme": INT4})
    assert "head" in made.quantized
    assert part_ties(model, made) == {"head": "embed"}
    assert find_ties(model, made) == {}


def test_activations_do_not_part_weights() -> None:
    model = net(tie=True)
    dynamic = {"bits": 8, "activation": "int8-dynamic"}
    made = plan(model, {"role": "embedding", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": dynamic})
    assert part_ties(model, made) == {}
