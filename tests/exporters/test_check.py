"""check: what no runtime can hold is found first, and the printed rule is one that all can."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import yaml
from torch import nn

from qaware.errors import QawareError
from qaware.exporters.base import Exporter, Tolerance
from qaware.exporters.check import Problem, check, require_legal
from qaware.plan import Decision, Plan
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme

WIDTH = 172  # of a Llama's MLP with 64 features: 4, 43, 86 and 172 divide it, 32 does not


class Fake(Exporter):
    name, suffix, tolerance = "fake", ".fake", Tolerance(1, 1, "none")

    def __init__(self, name: str, holds: Callable[[Scheme], bool], packages: tuple[str, ...] = ()) -> None:
        self.name, self.holds, self.packages = name, holds, packages  # type: ignore[misc]

    def refuse(self, decision: Decision) -> str | None:
        assert decision.scheme is not None
        return None if self.holds(decision.scheme) else f"{decision.scheme.label} is not for me"

    def write(self, *_: object) -> None:
        raise NotImplementedError

    open = write  # type: ignore[assignment]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.up_proj = nn.Linear(64, WIDTH)
        self.down_proj = nn.Linear(WIDTH, 64)


def plan(*rules: Rule, recipe: Recipe | None = None) -> Plan:
    return (recipe or Recipe("r", rules)).match(Net())


INT4 = plan(Rule(Scheme(4, 32, "int8-dynamic", scale_dtype="bfloat16"), type="Linear"))
STATIC = plan(Rule(Scheme(8, 0, "int8-static"), type="Linear"))
ANYTHING = Fake("any", lambda s: True)
GROUPS_OF_4 = Fake("four", lambda s: s.group_size % 4 == 0)
CHANNEL = Fake("channel", lambda s: s.group_size == 0)
EIGHT_PER_CHANNEL = Fake("eight", lambda s: s.bits == 8 or s.group_size > 0)
WEIGHT_ONLY = Fake("floats", lambda s: s.activation == "none")
FLOAT_ONLY = Fake("half", lambda s: s.is_float)
NOTHING = Fake("nothing", lambda s: False)


def nearest(exporters: list[Exporter], made: Plan = INT4) -> Scheme | None:
    problem = next(p for p in check(made, exporters) if p.layer == "down_proj")
    return problem.nearest


@pytest.mark.parametrize(
    ("exporters", "expected"),
    [
        ([], Scheme(4, 43, "int8-dynamic", scale_dtype="bfloat16")),
        ([ANYTHING], Scheme(4, 43, "int8-dynamic", scale_dtype="bfloat16")),
        ([ANYTHING, GROUPS_OF_4], Scheme(4, 0, "int8-dynamic", scale_dtype="bfloat16")),
        ([GROUPS_OF_4, CHANNEL], Scheme(4, 0, "int8-dynamic", scale_dtype="bfloat16")),
        ([CHANNEL, EIGHT_PER_CHANNEL], Scheme(8, 0, "int8-dynamic", scale_dtype="bfloat16")),
        ([CHANNEL, EIGHT_PER_CHANNEL, WEIGHT_ONLY], Scheme(8, 0, "none", scale_dtype="bfloat16")),
        ([ANYTHING, FLOAT_ONLY], Scheme(16)),
        ([ANYTHING, NOTHING], None),
    ],
)
def test_the_nearest_scheme_is_one_that_all_hold(exporters: list[Exporter], expected: Scheme | None) -> None:
    assert nearest(exporters) == expected


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        (lambda s: s.activation != "int8-static", Scheme(8, 0, "int8-dynamic")),
        (lambda s: s.activation == "none", Scheme(8)),
        (lambda s: s.scale_dtype == "bfloat16", Scheme(8, 0, "int8-static", scale_dtype="bfloat16")),
        (lambda s: s.group_size > 0, Scheme(8, WIDTH, "int8-static")),
    ],
)
def test_a_channel_stays_a_channel_where_that_is_not_the_problem(
    holds: Callable[[Scheme], bool], expected: Scheme
) -> None:
    assert nearest([Fake("f", holds)], STATIC) == expected


def test_a_static_activation_keeps_its_observer_and_another_has_none() -> None:
    made = plan(Rule(Scheme(8, activation="int8-static", observer="histogram"), name="down_proj"))
    assert nearest([Fake("f", lambda s: s.scale_dtype == "bfloat16")], made) == Scheme(
        8, 0, "int8-static", scale_dtype="bfloat16", observer="histogram"
    )
    assert nearest([Fake("f", lambda s: s.activation != "int8-static")], made) == Scheme(8, 0, "int8-dynamic")


def test_a_far_group_is_found_before_the_scheme_changes() -> None:
    made = Recipe("r", (Rule(Scheme(4, 32), type="Linear"),)).match(nn.Sequential(nn.Linear(4096, 8)))
    assert check(made, [Fake("f", lambda s: s.group_size == 2048)])[0].nearest == Scheme(4, 2048)


def test_a_group_of_the_whole_row_is_said_by_0() -> None:
    made = plan(Rule(Scheme(4, 128), name="down_proj"))
    assert nearest([Fake("f", lambda s: s.group_size in (0, WIDTH, 4))], made) == Scheme(4)
    assert nearest([Fake("f", lambda s: s.group_size in (WIDTH, 4))], made) == Scheme(4, WIDTH)


def test_a_row_of_one_weight_has_one_scale() -> None:
    made = Recipe("r", (Rule(Scheme(3, 2), type="Linear"),)).match(nn.Linear(1, 8))
    assert check(made, [])[0].nearest == Scheme(3)


def test_asymmetric_becomes_symmetric() -> None:
    made = plan(Rule(Scheme(4, 4, symmetric=False), type="Linear"))
    assert nearest([Fake("f", lambda s: s.symmetric)], made) == Scheme(4, 4)


def test_refused_float16_gets_int8() -> None:
    made = plan(Rule(Scheme(16), type="Linear"))
    assert nearest([Fake("f", lambda s: not s.is_float)], made) == Scheme(8)
    assert nearest([NOTHING], made) is None


def test_an_embedding_is_offered_no_activation() -> None:
    made = plan(Rule(Scheme(4, 32), role="embedding"))
    found = check(made, [Fake("f", lambda s: s.activation != "none" or s.bits == 8)])
    assert [p.nearest for p in found] == [Scheme(8, 32)]


def test_a_legal_plan_has_no_problem_and_its_exporters_are_asked_for_every_layer() -> None:
    asked: list[Scheme] = []

    def holds(scheme: Scheme) -> bool:
        asked.append(scheme)
        return True

    made = plan(Rule(Scheme(4, 4), name="*"))
    assert check(made, [Fake("f", holds)]) == []
    assert len(asked) == 3
    require_legal(made, [ANYTHING])


def test_every_layer_is_reported_in_one_error() -> None:
    made = plan(Rule(Scheme(3), type="Linear"), Rule(Scheme(4), role="embedding"))
    with pytest.raises(QawareError) as caught:
        require_legal(made, [Fake("even", lambda s: s.bits % 2 == 0)])
    assert str(caught.value) == (
        "recipe 'r': up_proj: even: int3 channel is not for me; nearest legal: int4 channel, by the first "
        "rule {name: 'up_proj', scheme: {bits: 4}} | down_proj: even: int3 channel is not for me; nearest "
        "legal: int4 channel, by the first rule {name: 'down_proj', scheme: {bits: 4}}; legal as they are: "
        "float16, int4-static, int8-dynamic, int8-static, int8-static-per-tensor, int8-weight-only"
    )


def test_layers_that_differ_only_in_their_block_share_one_text() -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(WIDTH, 4)}) for _ in range(3))
    recipe = Recipe("r", (Rule(Scheme(3), type="Linear"),))
    with pytest.raises(QawareError) as caught:
        require_legal(recipe.match(nn.ModuleDict({"h": blocks})), [Fake("even", lambda s: s.bits % 2 == 0)])
    text = str(caught.value)
    assert text.startswith(
        "recipe 'r': h.0.fc and 2 more: even: int3 channel is not for me; nearest legal: int4"
    )
    assert "{name: 'h.*.fc', scheme: {bits: 4}}" in text
    assert text.count("is not for me") == 1


@pytest.mark.parametrize(
    "exporters",
    [[ANYTHING], [GROUPS_OF_4], [CHANNEL, EIGHT_PER_CHANNEL], [WEIGHT_ONLY, GROUPS_OF_4], [FLOAT_ONLY]],
    ids=lambda e: "+".join(x.name for x in e),
)
def test_the_printed_rule_really_fixes_it(exporters: list[Exporter]) -> None:
    recipe = Recipe.load("int8-dynamic-int4-weight")
    with pytest.raises(QawareError) as caught:
        require_legal(recipe.match(Net()), exporters)
    printed = re.findall(r"by the first rule (\{name: .*?\}\})", str(caught.value))
    assert printed
    rules = [Rule.from_dict(yaml.safe_load(text)) for text in printed]
    require_legal(recipe.prepend(*rules).match(Net()), exporters)


def test_a_model_that_is_one_layer_gets_a_rule_too() -> None:
    layer = nn.Linear(WIDTH, 4)
    recipe = Recipe("r", (Rule(Scheme(4, 32), type="Linear"),))
    text = str(check(recipe.match(layer), [])[0])
    rule = Rule.from_dict(yaml.safe_load(text.partition("by the first rule ")[2]))
    require_legal(recipe.prepend(rule).match(layer), [])


def test_a_missing_package_is_a_problem_with_the_command_that_installs_it() -> None:
    class Extra(Fake):
        extra = "tract"

    made = plan(Rule(Scheme(8), type="Linear"))
    missing = "no_such_package"
    for exporter, words in (
        (Extra("t", lambda s: True, (missing,)), "pip install 'qaware[tract]'"),
        (Fake("plugin", lambda s: True, ("os", f"{missing}.inner")), f"pip install {missing}"),
    ):
        problems = check(made, [exporter])
        assert [p.layer for p in problems] == [""]
        assert f"{exporter.name}: package '{missing}" in problems[0].message
        with pytest.raises(QawareError) as caught:
            require_legal(made, [exporter])
        assert str(caught.value).endswith(words)
    assert Fake("f", lambda s: True, ("os", "os.path")).missing() is None


def test_a_runtime_may_refuse_the_plan_as_a_whole() -> None:
    class Whole(Fake):
        def refuse_plan(self, plan: Plan) -> str | None:
            return f"whole: {len(plan.quantized)} layers are too many"

    made = plan(Rule(Scheme(8), type="Linear"))
    assert [str(p) for p in check(made, [Whole("w", lambda s: True)])] == ["whole: 2 layers are too many"]


def test_a_plan_that_quantizes_nothing_is_not_legal() -> None:
    with pytest.raises(QawareError, match="quantizes nothing"):
        require_legal(plan(Rule(Scheme(8), type="Conv2d")), [ANYTHING])


def test_a_problem_without_a_way_out_says_no_more() -> None:
    assert str(Problem("a.b", "is odd")) == "a.b: is odd"
    assert str(Problem("", "no disk")) == "no disk"
