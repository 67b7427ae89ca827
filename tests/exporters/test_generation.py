"""Key-value caches compute what a whole text computes, in every kind of model that has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qaware
from qaware.errors import QawareError
from qaware.exporters.generation import (
    CAPPED,
    CachedRunner,
    CacheSpec,
    GrowingStep,
    StaticStep,
    cache_of,
    why_no_cache,
)
from qaware.exporters.signature import Signature, TensorSpec
from qaware.lm import CausalLM
from qaware.tasks import language_signature

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma": {**LLAMA, "model_type": "gemma", "head_dim": 16},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, "max_position_embeddings": 64},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 64},
}
SIGNATURE = language_signature("input_ids", 50, 24)


def lm(kind: str = "llama", **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM({**KINDS[kind], "vocab_size": 50, **changes}).eval()


def in_steps(model: Any, ids: Tensor, spec: CacheSpec) -> tuple[Tensor, Tensor]:
    """Logits by a fixed cache, dirty from another text, and by a growing one: the prompt, then each token."""
    fixed, grown = [], []
    held, past = [torch.full_like(t, 7.0) for t in spec.empty()], spec.empty(0)
    parts = [(0, 9), *((i, i + 1) for i in range(9, ids.shape[1]))]
    for start, end in parts:
        fixed.append(StaticStep(model)(ids[:, start:end], torch.arange(start, end), *held))
        logits, *past = GrowingStep(model)(ids[:, start:end], *past)
        grown.append(logits)
    assert past[0].shape[2] == ids.shape[1]
    return torch.cat(fixed, 1), torch.cat(grown, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_compute_what_the_whole_text_computes(kind: str) -> None:
    model, ids = lm(kind), torch.randint(0, 50, (1, 14))
    spec = cache_of(model, SIGNATURE)
    assert spec is not None
    with torch.no_grad():
        whole = model(ids)
        fixed, grown = in_steps(model, ids, spec)
    torch.testing.assert_close(fixed, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(grown, whole, atol=1e-5, rtol=0)


def test_a_converted_model_keeps_its_cache() -> None:
    model = qaware.quantize(lm(), "int8-dynamic-int4-weight").module
    ids = torch.randint(0, 50, (1, 14))
    spec = cache_of(model, SIGNATURE)
    assert spec == CacheSpec(64, ((2, 8),) * 4)
    with torch.no_grad():
        fixed, grown = in_steps(model, ids, spec)
        # An activation on the edge between two integers may go to the other one.
        assert (fixed - model(ids)).abs().mean() < 1e-3
        assert torch.equal(fixed, fixed)
        assert (grown - model(ids)).abs().mean() < 1e-3


def test_an_embedding_in_float16_does_not_make_the_mask_one() -> None:
    model = qaware.quantize(lm(), "float16").module
    assert cache_of(model, SIGNATURE) is not None


def test_the_length_is_the_context_within_bounds() -> None:
    assert cache_of(lm(), SIGNATURE, 32) == CacheSpec(32, ((2, 8),) * 4)
    long = cache_of(lm(max_position_embeddings=4096), SIGNATURE)
    assert long is not None
    assert long.length == CAPPED
    for length in (23, 65):
        with pytest.raises(QawareError, match=f"cache_length: {length} must be 24 .*to 64"):
            cache_of(lm(), SIGNATURE, length)


def test_models_without_one_say_why() -> None:
    assert "no step" in str(why_no_cache(nn.Linear(2, 2), SIGNATURE))
    assert "sliding_attention" in str(why_no_cache(lm("mistral", sliding_window=16), SIGNATURE))
    two = Signature((SIGNATURE.inputs[0], TensorSpec("mask", "int64", (1, "seq"))), SIGNATURE.symbols)
    assert "not one row of token ids" in str(why_no_cache(lm(), two))
    assert cache_of(lm(), two) is None
    assert why_no_cache(lm(), SIGNATURE) is None


def test_the_mode_of_the_module_stays() -> None:
    model = lm().train()
    cache_of(model, SIGNATURE)
    assert model.training
    assert model.model.training


def test_a_runner_refuses_what_does_not_fit() -> None:
    runner = CachedRunner(8, 4, lambda ids, start: ids.float() + start)
    assert runner.step(torch.ones(1, 4, dtype=torch.int64), 4).tolist() == [[5.0] * 4]
    with pytest.raises(QawareError, match="5 tokens at once, the most are 4"):
        runner.step(torch.ones(1, 5, dtype=torch.int64), 0)
    with pytest.raises(QawareError, match="tokens 6 to 10 do not fit into a cache of 8"):
        runner.step(torch.ones(1, 4, dtype=torch.int64), 6)
