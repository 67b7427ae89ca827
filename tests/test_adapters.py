"""Adapters: rules and roles see a model with peft's modules as they see it without."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from qaware.adapters import find_places, from_peft, successor
from qaware.errors import QawareError
from qaware.matching import rematch
from qaware.plan import Plan
from qaware.recipe import Recipe, Rule
from qaware.roles import find_roles
from qaware.scheme import Scheme

peft = pytest.importorskip("peft")

INT4 = Scheme(4, 8)


class Net(nn.Module):
    """A block of attention and feedforward, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(16, 16), "fc1": nn.Linear(16, 16)})])
        self.conv = nn.Conv1d(16, 16, 1)
        self.lm_head = nn.Linear(16, 10, bias=False)


def adapted(*targets: str, net: nn.Module | None = None, **options: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=list(targets), **options)
    return peft.get_peft_model(net or Net(), config)


def plan(model: nn.Module, *rules: Rule) -> Plan:
    return Recipe("r", rules or (Rule(INT4, type="Linear"),)).match(model)


def test_a_model_without_peft_has_no_places() -> None:
    assert find_places(Net()) == {}
    assert not from_peft(Net())
    assert successor(nn.Linear(2, 2)) is None


def test_a_recipe_decides_the_same_with_and_without_adapters() -> None:
    rules = (
        Rule(Scheme(8), name="layers.0.q_proj"),
        Rule(None, name="*.fc1"),
        Rule(Scheme(5), role="head"),
        Rule(Scheme(3), role="embedding"),
    )
    plain, under = plan(Net(), *rules), plan(adapted("q_proj", "fc1", "lm_head"), *rules)
    kept = [d for d in under.decisions if d.dropped is None]
    assert [(d.alias, d.role, d.scheme, d.reason, d.type, d.shape) for d in kept] == [
        (d.module, d.role, d.scheme, d.reason, d.type, d.shape) for d in plain.decisions
    ]
    assert under.layer("base_model.model.layers.0.q_proj.base_layer").scheme == Scheme(8)
    assert rematch(under, Recipe("other", rules[2:])).quantized.keys() == {
        "base_model.model.lm_head.base_layer",
        "base_model.model.embed",
    }


def test_a_rule_may_use_the_full_name() -> None:
    name = "base_model.model.layers.0.q_proj.base_layer"
    assert list(plan(adapted("q_proj"), Rule(INT4, name=name)).quantized) == [name]
    with pytest.raises(QawareError, match=r"name: 'layers\.0\.k_proj' matches no module"):
        plan(adapted("q_proj"), Rule(INT4, name="layers.0.k_proj"))


def test_an_adapter_is_never_quantized_and_counts_apart() -> None:
    made = plan(adapted("q_proj", "lm_head"), Rule(Scheme(8), name="*"))
    adapters = [d for d in made.decisions if "lora_" in d.parameter]
    assert len(adapters) == 4
    assert {d.reason for d in adapters} == {"adapter, merged at convert"}
    assert all(d.scheme is None and d.role is None for d in adapters)
    count = sum(d.numel for d in adapters)
    total = sum(p.numel() for p in Net().parameters())
    quantized = total - 16 * 3
    assert made.summary().startswith(f"r: 5 layers, {quantized:,} of {total:,} parameters")
    assert made.summary().endswith(f"; adapters: {count}, gone at convert")


def test_roles_of_layers_under_an_adapter() -> None:
    roles = find_roles(nn.ModuleDict({"model": adapted("q_proj", "fc1", "lm_head", "embed")}))
    inner = "model.base_model.model."
    assert roles[f"{inner}layers.0.q_proj.base_layer"] == "attention"
    assert roles[f"{inner}layers.0.fc1.base_layer"] == "feedforward"
    assert roles[f"{inner}lm_head.base_layer"] == "head"
    assert roles[f"{inner}embed.base_layer"] == "embedding"
    assert not any("lora_" in name for name in roles)


def test_a_declared_head_under_an_adapter() -> None:
    class Declares(Net):
        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    roles = find_roles(adapted("lm_head", net=Declares()))
    assert roles["base_model.model.lm_head.base_layer"] == "head"


def test_a_head_that_is_trained_whole_takes_the_place_of_the_original() -> None:
    model = adapted("q_proj", modules_to_save=["lm_head"])
    made = plan(model, Rule(INT4, role="head"))
    assert list(made.quantized) == ["base_model.model.lm_head.modules_to_save.default"]
    original = next(d for d in made.decisions if "original_module" in d.parameter)
    assert original.reason == "not in use, dropped at convert"
    with model.disable_adapter():
        assert list(plan(model, Rule(INT4, role="head")).quantized) == [
            "base_model.model.lm_head.original_module"
        ]


def test_a_merged_weight_is_tied_to_nothing() -> None:
    net = Net()
    net.lm_head.weight = net.embed.weight
    assert [d.tied_to for d in plan(net).decisions if d.module == "lm_head"] == ["embed.weight"]
    assert all(d.tied_to is None for d in plan(adapted("lm_head", net=net)).decisions)


def test_what_cannot_train_inside_the_rounding_is_refused_only_where_a_rule_asks() -> None:
    cases: list[tuple[Any, str]] = [
        (adapted("q_proj", use_dora=True), "its adapter is a DoraLinearVariant"),
        (adapted("q_proj", lora_bias=True), "its adapter has a bias; set lora_bias=False"),
        (
            peft.get_peft_model(Net(), peft.LoHaConfig(r=2, target_modules=["q_proj"])),
            r"its adapter is a peft\.tuners\.loha\.layer\.Linear; only peft\.tuners\.lora\.Linear",
        ),
        (
            peft.get_peft_model(Net(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
            r"its adapter is a peft\.tuners\.ia3\.layer\.Linear",
        ),
    ]
    for model, message in cases:
        with pytest.raises(QawareError, match=rf"q_proj\.base_layer: {message}") as caught:
            plan(model).require_possible()
        assert "group_size" not in str(caught.value)
        left = plan(model, Rule(None, name="*.q_proj"), Rule(INT4, type="Linear"))
        left.require_possible()
        assert len(left.quantized) == 2


def test_an_adapted_embedding_is_refused_where_a_rule_asks() -> None:
    model = adapted("embed")
    with pytest.raises(
        QawareError, match=r"embed\.base_layer: its adapter is a peft\.\S+\.Embedding; .* by a"
    ):
        plan(model, Rule(INT4, role="embedding")).require_possible()
    plan(model, Rule(INT4, type="Linear")).require_possible()


def test_trained_rows_of_an_embedding_are_refused() -> None:
    model = adapted("q_proj", trainable_token_indices={"embed": [1, 2]})
    with pytest.raises(QawareError, match=r"its adapter is a peft\S+\.TrainableTokensLayer; only"):
        plan(model, Rule(INT4, role="embedding")).require_possible()


def test_merged_adapters_are_refused() -> None:
    model = adapted("q_proj")
    model.merge_adapter()
    with pytest.raises(QawareError, match=r"\['default'\] are merged into its weight; call unmerge_adapter"):
        plan(model).require_possible()
    model.unmerge_adapter()
    plan(model).require_possible()


class Packed(nn.Linear):
    """Stands for a layer of bitsandbytes: a Linear that computes something else."""


def test_a_base_layer_of_another_quantizer_is_refused() -> None:
    net = Net()
    net.lm_head = Packed(16, 10)
    model = adapted("lm_head", net=net)
    layer = model.base_model.model.lm_head
    layer.__class__ = type("Linear4bit", (type(layer),), {})
    with pytest.raises(
        QawareError, match=r"lm_head\.base_layer: its adapter is a \S+Linear4bit; only .* float"
    ):
        plan(model).require_possible()


def test_prompts_are_left_where_they_are() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 10}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(llama, config)
    assert successor(model) is None
    assert "base_model.model.layers.0.self_attn.q_proj" in plan(model).quantized
