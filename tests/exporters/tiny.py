"""A tiny language model and classifier that every exporter's test shares."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qaware.engines.base import QuantizedModel
from qaware.engines.modules import ModulesEngine
from qaware.exporters.signature import Signature, TensorSpec
from qaware.recipe import Recipe


class TinyLM(nn.Module):
    """Causal attention, RMSNorm and a gated MLP on 64 features; logits over 96 tokens."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.norm = nn.RMSNorm(64)
        self.qkv = nn.Linear(64, 192, bias=False)
        self.attn_out = nn.Linear(64, 64)
        self.gate_proj = nn.Linear(64, 96, bias=False)
        self.down_proj = nn.Linear(96, 64, bias=False)
        self.lm_head = nn.Linear(64, 96, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn_out(attended)
        x = x + self.down_proj(F.silu(self.gate_proj(self.norm(x))))
        return self.lm_head(self.norm(x))


SIGNATURE = Signature((TensorSpec("input_ids", "int64", (1, "seq"), 0, 95),), {"seq": (1, 64)})


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (1, length), generator=torch.Generator().manual_seed(seed))


def quantize(recipe: str | dict | Recipe, tie: bool = False, seed: int = 0) -> QuantizedModel:
    """TinyLM, prepared and converted (calibrated on one batch when the recipe is static)."""
    from qaware.observers import observers

    torch.manual_seed(seed)
    model = TinyLM(tie).eval()
    plan = Recipe.load(recipe).match(model)
    engine = ModulesEngine()
    engine.prepare(model, plan)
    for observer in observers(model):
        observer.observing = True
    model(tokens(64))
    for observer in observers(model):
        observer.observing = False
    return engine.convert(copy.deepcopy(model), plan)
