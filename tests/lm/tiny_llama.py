"""Configurations of tiny models, and a model to load, score and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qaware.lm import CausalLM

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 24,
    "tie_word_embeddings": True,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 8}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "vocab_size": 32}


def make(config: dict[str, Any] = LLAMA, **options: Any) -> CausalLM:
    """A model with weights large enough that a wrong mask shows in the logits."""
    torch.manual_seed(0)
    module = CausalLM(dict(config), **options)
    for weight in module.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return module


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(1))


def saved(folder: Path) -> str:
    """The model of `make` as a folder of transformers."""
    make().model.save_pretrained(folder)
    return str(folder)
