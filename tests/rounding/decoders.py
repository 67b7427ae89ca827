"""A small decoder with all places where scales may be folded, and what fills them with outliers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qaware.engines.example import Example
from qaware.rounding.folding import apply_scales
from qaware.rounding.folding_search import find_folds
from qaware.rounding.recording import Call

WIDTH, VOCABULARY = 8, 16


def called(*args: Any, **kwargs: Any) -> list[Call]:
    """A recording of one call."""
    return [Call("", Example(args, kwargs))]


class Attention(nn.Module):
    """Causal self-attention with fused projections and heads that share keys and values."""

    def __init__(self, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, self.head = heads, shared, WIDTH // heads
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * WIDTH // shared)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kept = WIDTH // self.shared
        q, k, v = (
            t.unflatten(-1, (-1, self.head)).transpose(1, 2)
            for t in self.qkv(x).split((WIDTH, kept, kept), -1)
        )
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """One block of an own decoder: a residual stream, a gated MLP whose two halves are one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.before, self.between, self.after = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.gate_up, self.down = nn.Linear(WIDTH, 24), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.before(x))
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        x = x + self.down(nn.functional.silu(gate) * up)
        return self.head(self.after(x))


def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))


def plant_outliers(model: nn.Module, recording: list[Call], factor: float, count: int = 1) -> None:
    """Make some channels of what enters the linear layers larger, in place; the model computes the same."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for fold in find_folds(model, recording, names)[0]:
        scales = torch.ones(fold.size)
        scales[torch.randperm(fold.size, generator=torch.Generator().manual_seed(0))[:count]] = 1 / factor
        apply_scales(model, fold, scales)
