"""Shapes of keys and values, and models that keep something else."""

from __future__ import annotations

import pytest

from qaware.errors import QawareError
from qaware.lm import CausalLM
from qaware.lm.key_values import recorded_shapes

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20}


def test_shapes_are_those_of_the_layers() -> None:
    model = CausalLM({"model_type": "llama", "intermediate_size": 64, "num_key_value_heads": 1, **SIZES})
    assert recorded_shapes(model) == [(1, 8)] * 4
    assert model.training


def test_a_model_that_asks_for_more_is_named() -> None:
    model = CausalLM({"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, **SIZES})
    with pytest.raises(QawareError, match="'opt' keeps more than keys and values"):
        recorded_shapes(model)
    assert model.training
