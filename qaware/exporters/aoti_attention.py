"""``qaware::attend``: the attention of a language model with a key-value cache, by a kernel of its own.

Torch's repeats keys and values for every head that shares them, reads a mask as large as the scores, and
multiplies by MKL, whose kernels for AMD's CPUs use half of their width. This one (``aoti_attention.h``) reads
what a token sees, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qaware.exporters.generation import CacheSpec, StaticCache, attends
from qaware.exporters.signature import first_tensor

_LANES = 16
_LIBRARY = torch.library.Library("qaware", "FRAGMENT")
_LIBRARY.define("attend(Tensor query, Tensor keys, Tensor values, Tensor positions, float scale) -> Tensor")


def _compute(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """What the kernel computes: float32 (1, S, heads, width).

    Args:
        query: float32 (1, S, heads, dim).
        keys: float32 (1, kv_heads, held, dim); each of their heads serves several of the query.
        values: float32 (1, kv_heads, held, width).
        positions: int64 (S,): a token sees the keys up to this one.
        scale: of the scores.
    """
    later = torch.arange(keys.shape[2]) > positions.unsqueeze(1)
    mask = torch.where(later, -torch.inf, 0.0)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, mask, scale=scale, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous()


def _shape(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:3], values.shape[3]))


_LIBRARY.impl("attend", _compute, "CPU")
torch.library.register_fake("qaware::attend", _shape, lib=_LIBRARY)


class AttendingCache(StaticCache):
    """A static cache that computes the attention itself."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """(1, S, heads, width) of a query (1, heads, S, dim)."""
        operator: Any = torch.ops.qaware.attend
        attended: Tensor = operator(query.transpose(1, 2), keys, values, self.at, scale)
        return attended


class AttendingStep(nn.Module):
    """As StaticStep; the attention is ``qaware::attend``."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, positions: Tensor, *cache: Tensor) -> Tensor:
        """One step."""
        return first_tensor(self.module.step(input_ids, positions, AttendingCache(cache, positions)))


def can_attend(module: Any, cache: CacheSpec) -> bool:
    """Whether the kernel computes the attention of every layer: float32, in whole vectors."""
    floats = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return floats <= {torch.float32} and all(dim % _LANES == 0 for _, dim in cache.shapes) and attends(module)
