"""Which language models llama.cpp knows, and what their tensors are called there."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qaware.errors import QawareError


class Kind(NamedTuple):
    """An architecture of llama.cpp."""

    name: str
    """In the file."""
    neighbours: bool
    """Whether it rotates neighbouring features, where `transformers` rotates halves."""
    biases: bool
    """Whether linear layers may have them."""


KINDS = {
    "llama": Kind("llama", True, True),
    "mistral": Kind("llama", True, True),
    "qwen2": Kind("qwen2", False, True),
    "qwen3": Kind("qwen3", False, False),
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ENDING = re.compile(
    r"(?:^|\.)(model\.embed_tokens|lm_head|model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)$"
)


def is_known(module: str) -> bool:
    """Whether a layer of this name, whatever it is inside of, can be one of these models."""
    return _ENDING.search(module) is not None


def gguf_name(module: str) -> str | None:
    """``blk.0.attn_q`` of ``model.layers.0.self_attn.q_proj``; None for what no such model has."""
    if module in _WHOLE:
        return _WHOLE[module]
    found = _LAYER.fullmatch(module)
    if found is None or found[2] not in _PARTS:
        return None
    return f"blk.{found[1]}.{_PARTS[found[2]]}"


def find_model(module: Any) -> tuple[str, Any]:
    """The model of `transformers` in ``module``: its prefix there, and itself.

    Raises:
        QawareError: it is of no kind that can be written, or computes what llama.cpp does not.
    """
    found = [(prefix, part) for prefix, part in _candidates(module) if hasattr(part, "lm_head")]
    kind = getattr(getattr(found[0][1], "config", None), "model_type", None) if found else None
    if kind not in KINDS:
        what = f"model_type {kind!r}" if kind else type(module).__name__
        raise QawareError(
            f"gguf: {what} is none of {', '.join(KINDS)}, which are written for llama.cpp; "
            "use another runtime, e.g. onnxruntime"
        )
    prefix, model = found[0]
    _require_plain(model.config)
    return prefix, model


def _candidates(module: Any) -> list[tuple[str, Any]]:
    return [("", module), ("model.", getattr(module, "model", None))]


def _require_plain(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    for key, value, wanted in (
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("hidden_act", config.hidden_act, "silu"),
    ):
        if value != wanted:
            raise QawareError(f"gguf: {key} is {value!r}, only {wanted!r} is written; use another runtime")


def rows_of(name: str, config: Any) -> Tensor | None:
    """The order in which the rows of a tensor are written; None: as they are."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = heads.get(name.rpartition(".")[2])
    if count is None or not KINDS[config.model_type].neighbours:
        return None
    halves = torch.arange(count * head_dim(config)).view(count, 2, -1)
    return halves.transpose(1, 2).flatten()


def head_dim(config: Any) -> int:
    """Features of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
