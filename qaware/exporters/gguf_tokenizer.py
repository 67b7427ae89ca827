"""A byte-level BPE in a GGUF file, as llama.cpp's ``gpt2`` vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qaware.exporters.tokenizer_files import special_ids

_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}
"""The regular expressions that llama.cpp knows, by its names for them."""
NONE = "no tokenizer is in the file: give llama.cpp token ids"


def add_tokenizer(writer: Any, folder: Path | None, config: Any) -> list[str]:
    """Write the tokenizer of ``folder``, or that there is none; return notes for the report.

    Args:
        writer: of the file.
        folder: with ``tokenizer.json``; None: unknown.
        config: the model's, of which the vocabulary may be larger than the tokenizer's.
    """
    path = None if folder is None else folder / "tokenizer.json"
    if path is None or not path.is_file():
        writer.add_tokenizer_model("no_vocab")
        return [NONE]
    data = json.loads(path.read_text("utf-8"))
    split = _split(data.get("pre_tokenizer"))
    if data["model"]["type"] != "BPE" or split is None:
        writer.add_tokenizer_model("no_vocab")
        return [f"{NONE}; {path.name} is no byte-level BPE that llama.cpp has a name for"]
    _add_vocabulary(writer, data, int(config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    _add_ends(writer, path)
    return []


def _split(found: Any) -> str | None:
    """llama.cpp's name for a pre-tokenizer."""
    if not found:
        return None
    if found["type"] == "ByteLevel":
        return "gpt-2" if found.get("use_regex", True) and not found.get("add_prefix_space") else None
    if found["type"] == "Sequence" and [p["type"] for p in found["pretokenizers"]] == ["Split", "ByteLevel"]:
        return _SPLITS.get(found["pretokenizers"][0]["pattern"].get("Regex", ""))
    return None


def _add_vocabulary(writer: Any, data: dict[str, Any], size: int) -> None:
    """Tokens in the order of their ids; ids without one are unused."""
    from gguf import TokenType

    tokens = [f"[UNUSED{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, index in data["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for added in data.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = data["model"]["merges"]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def _add_ends(writer: Any, path: Path) -> None:
    """The ids of the first and last token of a text, and whether the tokenizer adds the first itself."""
    from tokenizers import Tokenizer

    first, ids = Tokenizer.from_file(str(path)).encode("a").ids[:1], special_ids(path.parent)
    if (end := ids.get("eos_token_id")) is not None:
        writer.add_eos_token_id(end)
    beginning = ids.get("bos_token_id")
    if beginning is not None:
        writer.add_bos_token_id(beginning)
    writer.add_add_bos_token(beginning is not None and first == [beginning])
