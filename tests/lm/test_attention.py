"""Attention that a cache computes instead of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.generation import StaticCache, attends
from qaware.lm import CausalLM
from qaware.lm.attention import attention

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "vocab_size": 20}


def lm(**changes: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM({**LLAMA, **changes}).eval()


class Attending(StaticCache):
    """Computes what the model would, and counts."""

    calls = 0

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        self.calls += 1
        mask = torch.arange(keys.shape[2])[None, :] <= self.at[:, None]
        y = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=True)
        return y.transpose(1, 2)


def test_a_cache_may_attend_and_nothing_of_it_stays() -> None:
    model, ids = lm(), torch.randint(0, 20, (1, 6))
    cache = Attending([torch.zeros(1, 2, 9, 8) for _ in range(4)], torch.arange(6))
    before = model.model.config._attn_implementation
    with torch.no_grad():
        found = model.step(ids, torch.arange(6), cache)
        torch.testing.assert_close(found, model(ids), atol=1e-5, rtol=0)
    assert cache.calls == 2
    assert model.model.config._attn_implementation == before


def test_who_leaves_it_to_the_cache_is_found_by_trying() -> None:
    assert attends(lm())
    assert attends(lm(model_type="qwen3", head_dim=8))
    assert not attends(lm(model_type="gpt_oss", head_dim=8))  # has sinks


def test_an_attention_with_more_is_refused() -> None:
    model = lm(model_type="gpt_oss", head_dim=8).model
    with attention(model, lambda *_: torch.zeros(1)), pytest.raises(QawareError, match="s_aux"):
        model(torch.zeros(1, 2, dtype=torch.int64))
