"""``genai_config.json``: where ONNX Runtime GenAI finds a model's parts, and how long its texts may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qaware.exporters.generation import CacheSpec
from qaware.exporters.tokenizer_files import special_ids

MODEL, SETTINGS = "model.onnx", "genai_config.json"


def write_settings(path: Path, ids: str, cache: CacheSpec, vocabulary: int) -> None:
    """Write the settings of the model in the folder ``path``, which may hold a tokenizer.

    Args:
        ids: name of the graph's first input.
        cache: of one size for all layers.
        vocabulary: size of the logits.
    """
    special = special_ids(path)
    if "eos_token_id" in special:  # what stands behind the end of a text that is shorter than others
        special.setdefault("pad_token_id", special["eos_token_id"])
    model = {
        "type": "decoder",
        **special,
        "vocab_size": vocabulary,
        "context_length": cache.length,
        "decoder": _decoder(ids, cache),
    }
    search = {"max_length": cache.length, "do_sample": False, "past_present_share_buffer": False}
    text = json.dumps({"model": model, "search": search}, indent=2)
    (path / SETTINGS).write_text(text + "\n", encoding="utf-8")


def _decoder(ids: str, cache: CacheSpec) -> dict[str, Any]:
    heads, features = cache.shapes[0]
    kinds = ("key", "value")
    return {
        "filename": MODEL,
        "session_options": {"provider_options": []},
        "num_hidden_layers": len(cache.shapes) // 2,
        "num_key_value_heads": heads,
        "head_size": features,
        "inputs": {"input_ids": ids, **{f"past_{k}_names": f"past_key_values.%d.{k}" for k in kinds}},
        "outputs": {"logits": "logits", **{f"present_{k}_names": f"present.%d.{k}" for k in kinds}},
    }
