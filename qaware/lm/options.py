"""The options of a TextDataModule: which values are allowed, and which of them decide what is cached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qaware.errors import QawareError
from qaware.lm.batches import LAYOUTS
from qaware.lm.cache import FORMAT, digest
from qaware.lm.documents import source_hash
from qaware.lm.tokens import SMALLEST_VOCAB, tokenizer_hash

_PLAIN = (
    "config",
    "split",
    "val_split",
    "text_field",
    "separator",
    "val_fraction",
    "layout",
    "bos",
    "max_documents",
)
"""Options that, with the text and the tokenizer, decide what is in a cache folder."""


def check(options: Mapping[str, Any]) -> None:
    """QawareError for the first option that is out of range."""
    least = {"block_size": 2, "batch_size": 1, "num_workers": 0, "max_documents": 1, "max_val_windows": 1}
    for key, smallest in least.items():
        if options[key] is not None and options[key] < smallest:
            raise QawareError(f"{key}: {options[key]!r} is too small; use {smallest} or more")
    if not 0 < options["val_fraction"] < 1:
        raise QawareError(f"val_fraction: {options['val_fraction']!r} must lie between 0 and 1, e.g. 0.1")
    if options["layout"] not in LAYOUTS:
        raise QawareError(f"layout: {options['layout']!r} is unknown; use one of {', '.join(LAYOUTS)}")
    size = options["tokenizer"]
    if isinstance(size, int) and size < SMALLEST_VOCAB:
        raise QawareError(
            f"tokenizer: {size!r} tokens are too few; use {SMALLEST_VOCAB} (256 bytes, BOS, EOS) or more"
        )


def folder_name(options: Mapping[str, Any]) -> str:
    """32 hex digits that differ when the text, the tokenizer or another option would change a token."""
    made_from: dict[str, Any] = {name: options[name] for name in _PLAIN} | {"format": FORMAT}
    made_from["tokenizer"] = tokenizer_hash(options["tokenizer"])
    for key in ("source", "val_source"):
        source = options[key]
        made_from[key] = source and source_hash(source, key)
    return digest(made_from)[:32]
