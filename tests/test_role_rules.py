"""roles: the rules that they stand for, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from qaware.errors import QawareError
from qaware.recipe import Recipe, Rule
from qaware.role_rules import rules_of
from qaware.scheme import Scheme


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(8, 8), nn.Linear(8, 8)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.adapter, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 10)


def bits(roles: Any, **more: Any) -> dict[str, int | None]:
    plan = Recipe.from_dict({"roles": roles, **more}).match(Decoder())
    return {d.module: d.scheme.bits if d.scheme else None for d in plan.decisions if "weight" in d.parameter}


def test_each_role_has_its_scheme_and_the_rest_the_default() -> None:
    found = bits({role: {"bits": n} for n, role in enumerate(("default", "embedding", "attention"), start=2)})
    assert found == {
        "embed": 3,
        "layers.0.q_proj": 4,
        "layers.0.up_proj": 2,
        "layers.1.q_proj": 4,
        "layers.1.up_proj": 2,
        "adapter": 2,
        "lm_head": 2,
    }
    assert bits({"default": {"bits": 4}, "head": None, "feedforward": {"bits": 8}}) == {
        "embed": 4,
        "layers.0.q_proj": 4,
        "layers.0.up_proj": 8,
        "layers.1.q_proj": 4,
        "layers.1.up_proj": 8,
        "adapter": 4,
        "lm_head": None,
    }


def test_without_a_default_what_has_no_role_stays_float() -> None:
    assert bits({"feedforward": {"bits": 8}})["lm_head"] is None


@pytest.mark.parametrize("block", [1, -1, "1"])
def test_single_blocks_may_differ(block: int | str) -> None:
    found = bits({"attention": {block: {"bits": 8}}, "default": {"bits": 4}})
    assert [found["layers.0.q_proj"], found["layers.1.q_proj"]] == [4, 8]


def test_rules_win_over_roles_and_are_what_is_kept() -> None:
    first = {"name": "lm_head", "scheme": {"bits": 8}}
    assert bits({"default": {"bits": 4}}, rules=[first])["lm_head"] == 8
    made = Recipe.from_dict({"roles": {"head": {"bits": 8}}})
    assert made.rules == (Rule(Scheme(8), role="head"),)
    assert Recipe.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"neck": {"bits": 4}}, r"^roles: unknown role 'neck'; known: default, embedding, attention, feedf"),
        ({}, r"^roles: \{\} must be a mapping of default"),
        ([{"role": "head"}], r"must be a mapping"),
        ({"embedding": {0: {"bits": 4}}}, r"^roles\.embedding: is in no block; give it one scheme"),
        ({"attention": {"bit": 4}}, r"^scheme: unknown key 'bit'"),
        ({"default": "int4"}, r"^scheme: 'int4' must be a mapping"),
    ],
)
def test_what_is_wrong_is_said(roles: Any, message: str) -> None:
    with pytest.raises(QawareError, match=message):
        Recipe.from_dict({"roles": roles})


def test_a_block_that_is_not_there_is_an_error() -> None:
    with pytest.raises(QawareError, match="blocks: 7 is none of this model"):
        bits({"attention": {7: {"bits": 8}}})


def test_plain_rules() -> None:
    assert rules_of({"head": None}) == [{"role": "head", "scheme": None}]
