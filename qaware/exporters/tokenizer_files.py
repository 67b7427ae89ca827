"""The tokenizer inside an artifact, for runtimes that read text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from qaware.engines.base import QuantizedModel
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Exporter
from qaware.exporters.signature import Signature
from qaware.plan import Plan

_NAMES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
NO_TOKENIZER = "no tokenizer is in the folder"


class TextExporter(Exporter):
    """An exporter of language models alone, whose artifact holds the tokenizer that the sidecar names."""

    tokenizer: Path | None = None
    """Its folder, while an artifact is written."""

    def export(
        self,
        quantized: QuantizedModel,
        example: tuple[Tensor, ...],
        signature: Signature,
        path: Path,
        metadata: dict[str, Any] | None = None,
    ) -> Artifact:
        """As of every exporter; the tokenizer that ``metadata`` names beside ``path`` goes into it."""
        named = (metadata or {}).get("tokenizer")
        self.tokenizer = None if named is None else path.parent / named
        return super().export(quantized, example, signature, path, metadata)

    def refuse_plan(self, plan: Plan) -> str | None:
        """What has no embedding is no language model."""
        if any("Embedding" in decision.type for decision in plan.decisions):
            return None
        return (
            f"{self.name}: is for language models, and this model has no embedding; use another runtime, "
            "e.g. onnxruntime"
        )

    def copy_tokenizer(self, path: Path) -> bool:
        """Copy its files into the artifact ``path``, a folder; whether there is one."""
        if self.tokenizer is None or not self.tokenizer.is_dir():
            return False
        for pattern in _NAMES:
            for file in filter(Path.is_file, self.tokenizer.glob(pattern)):
                shutil.copyfile(file, path / file.name)
        return any((path / name).is_file() for name in _VOCABULARIES)


def special_ids(folder: Path) -> dict[str, int]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, those that the tokenizer in ``folder`` has."""
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not (path.is_file() and config.is_file()):
        return {}
    from tokenizers import Tokenizer

    tokenizer, named = Tokenizer.from_file(str(path)), json.loads(config.read_text("utf-8"))
    found = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = named.get(key)
        index = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        if index is not None:
            found[f"{key}_id"] = index
    return found
