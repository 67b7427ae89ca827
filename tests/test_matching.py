"""Matching: the fate of every parameter, with a reason that a person can act on."""

from __future__ import annotations

import pytest
from torch import nn

from qaware.errors import QawareError
from qaware.matching import rematch
from qaware.plan import Plan
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme

INT4 = Scheme(4, 32)


class OwnForward(nn.Linear):
    def forward(self, input):  # type: ignore[no-untyped-def]
        return super().forward(input) * 2


class Net(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.norm = nn.LayerNorm(32)
        self.up_proj = nn.Linear(32, 172)
        self.down_proj = nn.Linear(172, 32, bias=False)
        self.own = OwnForward(32, 32)
        self.lm_head = nn.Linear(32, 10, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight


def plan(*rules: Rule, model: nn.Module | None = None) -> Plan:
    return Recipe("r", rules).match(model or Net())


def test_every_parameter_has_exactly_one_decision() -> None:
    model = Net()
    made = plan(Rule(INT4, name="*"), model=model)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(d.parameter for d in made.decisions) == sorted(names)
    assert {d.parameter for d in made.skipped} | {f"{n}.weight" for n in made.quantized} | {
        d.parameter for d in made.problems
    } == set(names)


def test_reasons() -> None:
    made = plan(Rule(None, role="head"), Rule(Scheme(8, activation="int8-dynamic"), name="*[!m]"))
    reasons = {d.parameter: d.reason for d in made.decisions}
    assert reasons["norm.weight"].startswith("no rule matches (type ")
    assert reasons["lm_head.weight"] == "kept float by rule role=head"
    assert reasons["up_proj.bias"] == "a bias stays float"
    assert reasons["up_proj.weight"] == "rule name=*[!m]"
    assert reasons["embed.weight"] == "rule name=*[!m] (weight only)"
    assert reasons["own.weight"].startswith(f"type {__name__}.OwnForward is not supported")
    assert made.layer("embed").scheme == Scheme(8)
    assert made.layer("up_proj").scheme == Scheme(8, activation="int8-dynamic")


def test_a_layer_that_only_looks_like_linear_is_left_alone_and_reported() -> None:
    made = plan(Rule(INT4, type="Linear"), Rule(INT4, name="own"))
    assert "own" not in made.quantized
    decision = next(d for d in made.skipped if d.parameter == "own.weight")
    assert "not their subclasses" in decision.reason
    attention = nn.MultiheadAttention(32, 2)  # its out_proj is a subclass, whose weight it reads itself
    made = plan(Rule(INT4, name="*"), model=nn.ModuleDict({"mha": attention, "fc": nn.Linear(32, 4)}))
    assert list(made.quantized) == ["fc"]


def test_the_first_rule_wins_and_all_its_conditions_must_hold() -> None:
    made = plan(
        Rule(Scheme(2), type="Linear", name="embed"),
        Rule(Scheme(3), role="embedding", name="*"),
        Rule(Scheme(8), type="Linear"),
        Rule(Scheme(5), name="*"),
    )
    assert {n: d.scheme.bits for n, d in made.quantized.items() if d.scheme} == {
        "embed": 3,
        "up_proj": 8,
        "down_proj": 8,
        "lm_head": 8,
    }


def test_patterns_are_case_sensitive() -> None:
    both = nn.ModuleDict({"a": nn.Linear(32, 4), "A": nn.Linear(32, 4)})
    assert list(plan(Rule(INT4, name="a"), model=both).quantized) == ["a"]
    with pytest.raises(QawareError, match="name: 'UP_PROJ' matches no module"):
        plan(Rule(INT4, name="UP_PROJ"))


def test_a_pattern_that_matches_nothing_suggests_the_nearest_name() -> None:
    with pytest.raises(QawareError, match="name: 'upproj' matches no module; did you mean 'up_proj'"):
        plan(Rule(INT4, name="upproj"), Rule(INT4, name="*"))


def test_ties_are_named_and_counted_once() -> None:
    tied = plan(Rule(Scheme(8), role="embedding"), Rule(Scheme(8), role="head"))
    assert {d.parameter: d.tied_to for d in tied.decisions if d.tied_to} == {"lm_head.weight": "embed.weight"}
    total = sum(p.numel() for p in Net().parameters())
    assert tied.summary().startswith(
        f"r: 2 layers, 320 of {total:,} parameters ({320 / total:.1%}) quantized; float: "
    )


def test_a_tied_head_counts_where_the_embedding_stays_float() -> None:
    head_only = plan(Rule(Scheme(8), role="head")).summary()
    assert head_only.startswith("r: 1 layer, 320 of ")
    assert "Embedding" not in head_only


@pytest.mark.parametrize(
    ("embedding", "head", "text"),
    [
        (None, Scheme(8), "1 layer, 1,280 of 1,320 parameters (97.0%) quantized; float: Linear 40"),
        (Scheme(8), None, "1 layer, 1,280 of 1,320 parameters (97.0%) quantized; float: Linear 40"),
        (Scheme(8), Scheme(4), "2 layers, 1,280 of 1,320 parameters (97.0%) quantized; float: Linear 40"),
        (None, None, "0 layers, 0 of 1,320 parameters (0.0%) quantized; float: Embedding 1,280, Linear 40"),
    ],
)
def test_the_shares_of_a_tied_model_add_up(embedding: Scheme | None, head: Scheme | None, text: str) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(40, 32), "lm_head": nn.Linear(32, 40)})
    model["lm_head"].weight = model["embed"].weight
    made = plan(Rule(embedding, name="embed"), Rule(head, name="lm_head"), model=model)
    assert made.summary() == f"r: {text}"


def test_a_shared_module_has_one_decision() -> None:
    layer = nn.Linear(32, 32)
    made = plan(Rule(INT4, name="*"), model=nn.Sequential(layer, nn.ReLU(), layer))
    assert [d.parameter for d in made.decisions] == ["0.weight", "0.bias"]


def test_a_model_that_is_one_layer() -> None:
    made = plan(Rule(INT4, type="Linear"), model=nn.Linear(32, 8))
    assert made.layer("").parameter == "weight"


def test_a_group_that_does_not_divide_names_layer_value_and_way_out() -> None:
    made = plan(Rule(INT4, type="Linear"))
    assert [d.module for d in made.problems] == ["down_proj"]
    assert "down_proj" not in made.quantized
    with pytest.raises(QawareError) as caught:
        made.require_possible()
    assert str(caught.value) == (
        "recipe 'r': down_proj: group_size 32 does not divide its 172 input weights; "
        "nearest legal group_size: 43 or 86 or 4, or 0 (one scale per output channel)"
    )


def test_a_lazy_layer_is_named() -> None:
    with pytest.raises(QawareError, match=r"0\.weight: has no shape yet; run one batch"):
        plan(Rule(INT4, name="*"), model=nn.Sequential(nn.LazyLinear(4)))


def test_a_width_without_divisors_offers_the_channel() -> None:
    made = plan(Rule(INT4, name="*"), model=nn.Sequential(nn.Linear(1, 4)))
    with pytest.raises(QawareError, match=r"nearest legal group_size: 0 \(one scale"):
        made.require_possible()


def test_a_recipe_that_quantizes_nothing_is_refused() -> None:
    with pytest.raises(QawareError, match=r"quantizes nothing in this model \(rules: type=Conv9d\)"):
        plan(Rule(INT4, type="Conv9d")).require_possible()
    with pytest.raises(QawareError, match="quantizes nothing"):
        plan(Rule(INT4, name="*"), model=nn.ReLU()).require_possible()


def test_a_reparametrized_layer_stays_float_and_is_reported() -> None:
    """spectral_norm has a ``weight_orig`` too, but no mask: its weight is no pruned parameter."""
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(32, 8)), nn.Linear(8, 32))
    made = plan(Rule(Scheme(8), type="Linear"), model=model)
    assert made.quantized.keys() == {"1"}
    reasons = {d.parameter: d.reason for d in made.skipped}
    assert "Linear under a reparametrization" in reasons["0.weight_orig"]


def numbered() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(8, 32)
    model.encoder = nn.ModuleList(
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(3)
    )
    model.decoder = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    return model


def in_blocks(*blocks: int) -> list[str]:
    rules = (Rule(Scheme(8), blocks=blocks, type="Linear"), Rule(Scheme(4), type="Linear"))
    plan = Recipe("r", rules).match(numbered())
    return [n for n, d in plan.quantized.items() if d.scheme == Scheme(8)]


def test_blocks_are_counted_in_each_list_and_from_its_end() -> None:
    assert in_blocks(0, -1) == [
        "encoder.0.0",
        "encoder.0.2",
        "encoder.2.0",
        "encoder.2.2",
        "decoder.0",
        "decoder.3",
    ]
    assert in_blocks(-2) == ["encoder.1.0", "encoder.1.2", "decoder.2"]
    assert in_blocks(3) == ["decoder.3"]


def test_blocks_match_again_under_another_recipe() -> None:
    model = numbered()
    first = Recipe("r", (Rule(Scheme(4), type="Linear"),)).match(model)
    other = Recipe("r", (Rule(Scheme(8), blocks=(-1,)), Rule(Scheme(4), type="Linear")))
    assert rematch(first, other).quantized == other.match(model).quantized


@pytest.mark.parametrize(
    ("model", "has"), [(numbered(), "4 numbered blocks"), (nn.Linear(2, 2), "no numbered")]
)
def test_a_block_that_is_not_there_is_an_error(model: nn.Module, has: str) -> None:
    with pytest.raises(QawareError, match=f"^blocks: -5 is none of this model, which has {has}"):
        Recipe("r", (Rule(Scheme(8), blocks=(-5, 0)),)).match(model)
