"""Language models for a Lightning Trainer: a causal LM of ``transformers`` and the text to train it on.

The names are looked up on first use, so that ``import qaware.lm`` stays free of torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaware.lm.causal_lm import CausalLM
    from qaware.lm.data import TextDataModule

__all__ = ["CausalLM", "TextDataModule"]

_HOMES = {"CausalLM": "qaware.lm.causal_lm", "TextDataModule": "qaware.lm.data"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
