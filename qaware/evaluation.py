"""Score an artifact that was exported earlier, on text of the user's choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.isolated import IsolatedRunner
from qaware.lm import TextDataModule
from qaware.metrics.language import score_language
from qaware.report.ledger import Row

# How text becomes windows; the rest of a data module's arguments says where its text came from.
_PROTOCOL = ("text_field", "separator", "block_size", "layout", "bos")


def evaluate_artifact(
    path: Path, data: str, window: int | None = None, max_windows: int | None = None
) -> Row:
    """Perplexity of a language model's artifact on its own runtime, in a process of its own.

    Args:
        path: the artifact; the tokenizer that its sidecar names lies beside it.
        data: text, jsonl or parquet file.
        window: tokens in a window; default as in the experiment that exported it.
        max_windows: score no more than this many.

    Raises:
        QawareError: damaged artifact, no tokenizer, unreadable or too short text.
    """
    artifact = Artifact.open(path)
    folder = artifact.metadata.get("tokenizer")
    if folder is None or not (path.parent / folder).is_dir():
        raise QawareError(
            f"{path}: has no tokenizer beside it; only language models of an experiment can be evaluated"
        )
    options: dict[str, Any] = {k: v for k, v in artifact.metadata["data"].items() if k in _PROTOCOL}
    if window is not None:
        options["block_size"] = window
    module = TextDataModule(
        data, tokenizer=str(path.parent / folder), val_source=data, max_val_windows=max_windows, **options
    )
    module.prepare_data()
    module.setup("validate")
    with IsolatedRunner(artifact) as runner:
        score = score_language(runner, module.windows())
    return {"model": path.name, "stage": artifact.runtime, "bytes": artifact.bytes, **score.row()}
