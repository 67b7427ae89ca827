"""What a recipe's rounding may say."""

from __future__ import annotations

from typing import Any

import pytest

from qaware.errors import QawareError
from qaware.recipe import Recipe
from qaware.roundings import (
    ROUNDINGS,
    Awq,
    BiasCorrection,
    Gptq,
    Hqq,
    Mse,
    Percentile,
    Rtn,
    SmoothQuant,
    parse_steps,
)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_every_name_alone(name: str) -> None:
    (*_, last) = steps = parse_steps(name)
    assert name in [step.name for step in steps]
    assert sum(step.stage == 1 for step in steps) == 1
    assert last.stage >= 1


def test_options_and_lists() -> None:
    assert parse_steps({"gptq": {"damping": 0.5, "act_order": True}}) == (Gptq(damping=0.5, act_order=True),)
    assert parse_steps(["awq", {"mse": {"candidates": 8}}, "bias-correction"]) == (
        Awq(),
        Mse(candidates=8),
        BiasCorrection(),
    )
    assert parse_steps({"hqq": None}) == (Hqq(),)


def test_labels_tell_options_apart() -> None:
    def label(rounding: Any) -> str:
        return Recipe.from_dict({"rules": [{"name": "*"}], "rounding": rounding}).rounding_label

    assert label(["awq", {"gptq": {"damping": 0.1}}]) == "awq+gptq"
    assert label({"gptq": {"damping": 0.05, "signed": True}}) == "gptq damping=0.05 signed=true"
    assert label(["smoothquant", "rtn"]) == "smoothquant"
    assert label("rtn") == "rtn"


def test_nearest_rounding_is_what_is_left_out() -> None:
    assert parse_steps(["smoothquant"]) == (SmoothQuant(), Rtn())
    assert parse_steps("bias-correction") == (Rtn(), BiasCorrection())


@pytest.mark.parametrize(
    ("rounding", "message"),
    [
        ("gtpq", "'gtpq' is not one of rtn, mse"),
        ([], "must be a name such as gptq, or a list of steps"),
        (7, "7 must be a name"),
        (["gptq", "mse"], "gptq and mse both choose the integers; keep one"),
        (["awq", "awq"], "names a step twice"),
        (["gptq", "awq"], r"must be \[awq, gptq\]"),
        ({"gptq": {"dampening": 0.1}}, "unknown option 'dampening'; did you mean 'damping'"),
        ({"gptq": {"damping": 2}}, "rounding.gptq.damping: 2 must be a number from 0.0 to 1.0"),
        ({"gptq": {"scales": "max"}}, "rounding.gptq.scales: 'max' is not one of mse, minmax"),
        ({"gptq": {"act_order": 1}}, "rounding.gptq.act_order: 1 must be true or false"),
        ({"gptq": {"signed": "no"}}, "rounding.gptq.signed: 'no' must be true or false"),
        ({"gptq": {"polish": -1}}, "rounding.gptq.polish: -1 must be a whole number, 0 or more"),
        ({"gptq": {"block": True}}, "rounding.gptq.block: True must be a whole number"),
        ({"mse": {"candidates": 1}}, "rounding.mse.candidates: 1 must be a whole number, 2 or more"),
        ({"percentile": {"share": 0.1}}, "rounding.percentile.share: 0.1 must be a number from 0.5"),
        ({"rtn": {"share": 1}}, "rounding.rtn: unknown option 'share'; known: none"),
        ({"gptq": 3}, "rounding.gptq: 3 must be a mapping of options"),
        ([{"gptq": {}, "mse": {}}], "must be a name, or one name with its options"),
    ],
)
def test_what_is_wrong_is_said(rounding: Any, message: str) -> None:
    with pytest.raises(QawareError, match=message):
        parse_steps(rounding)


def test_a_recipe_knows_what_it_needs() -> None:
    rules = [{"type": "Linear", "scheme": {"bits": 4}}]

    def made(rounding: Any) -> Recipe:
        return Recipe.from_dict({"rules": rules, "rounding": rounding})

    assert made("rtn").steps == (Rtn(),)
    assert not made("rtn").rounds
    assert made({"percentile": {"share": 0.9}}).steps == (Percentile(0.9),)
    assert made("mse").rounds
    assert not made("mse").needs_data
    assert made("bias-correction").needs_data
    assert Recipe.from_dict(made({"gptq": {"damping": 0.5}}).to_dict()).steps == (Gptq(damping=0.5),)
    assert made("gptq").hash != made({"gptq": {"damping": 0.5}}).hash
