"""Roles: read from types, from names, and from what a transformers model declares."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from qaware.roles import find_roles


class Tree(nn.Module):
    """A module whose submodules have the given dotted names; the leaves are linear layers."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, nn.Module())
                node = getattr(node, part)
            node.add_module(leaf, nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("layers.0.self_attn.q_proj", "attention"),
        ("layers.0.self_attn.o_proj", "attention"),
        ("h.0.attn.c_proj", "attention"),
        ("h.0.qkv", "attention"),
        ("encoder.layer.0.attention.self.query", "attention"),
        ("layers.0.mlp.down_proj", "feedforward"),
        ("layers.0.feed_forward.w1", "feedforward"),
        ("layers.0.ffn.up", "feedforward"),
        ("layers.0.block_sparse_moe.experts.3.w2", "feedforward"),
        ("encoder.layer.0.intermediate.dense", "feedforward"),
        ("layers.0.fc1", "feedforward"),
        ("lm_head", "head"),
        ("model.output", "head"),
        ("net.classifier", "head"),
        ("fc", "head"),
        ("layers.0.output", None),
        ("stem", None),
        ("keyboard", None),
        ("headless", None),
    ],
)
def test_names(name: str, role: str | None) -> None:
    assert find_roles(Tree(name)).get(name) == role


def test_an_embedding_is_one_whatever_its_name() -> None:
    model = nn.ModuleDict({"lm_head": nn.Embedding(4, 4)})
    assert find_roles(model) == {"lm_head": "embedding"}


def test_only_a_linear_layer_is_taken_for_a_head() -> None:
    assert find_roles(nn.ModuleDict({"head": nn.LayerNorm(4)})) == {}


class Declares(nn.Module):
    def __init__(self, head: str | None) -> None:
        super().__init__()
        self.predictor, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.declared = head

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, self.declared) if self.declared else None


def test_a_declared_head_wins_over_names() -> None:
    roles = find_roles(nn.ModuleDict({"inner": Declares("predictor")}))
    assert roles == {"inner.predictor": "head"}


def test_names_count_when_nothing_is_declared() -> None:
    assert find_roles(Declares(None)) == {"lm_head": "head"}


def test_a_real_llama(shared_data: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared_data / "lm" / "stories260K" / "hf")
    roles = find_roles(model)
    by_role = {role: sum(r == role for r in roles.values()) for role in roles.values()}
    assert roles["lm_head"] == "head"
    assert roles["model.embed_tokens"] == "embedding"
    assert by_role["head"] == by_role["embedding"] == 1
    assert {roles[f"model.layers.4.self_attn.{p}_proj"] for p in "qkvo"} == {"attention"}
    assert {roles[f"model.layers.4.mlp.{p}_proj"] for p in ("gate", "up", "down")} == {"feedforward"}
