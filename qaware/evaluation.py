"""Score an artifact that was exported earlier, on text or images of the user's choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.isolated import IsolatedRunner
from qaware.metrics.classification import score_classification
from qaware.metrics.language import score_language
from qaware.metrics.score import Score
from qaware.report.ledger import Row

# How text becomes windows; the rest of a data module's arguments says where its text came from.
_PROTOCOL = ("text_field", "separator", "block_size", "layout", "bos")
# Which images of a source; what is done to them is kept as `preprocessing`.
_CHOICE = ("config", "split", "val_split", "image_field", "label_field", "batch_size")


def evaluate_artifact(
    path: Path, data: str, window: int | None = None, max_windows: int | None = None
) -> Row:
    """Perplexity, or accuracy, of an experiment's artifact on its own runtime, in a process of its own.

    Args:
        path: the artifact; the tokenizer that its sidecar names lies beside it.
        data: text, jsonl or parquet file; for a classifier a source of labelled images, of which those kept
            apart for validation or test are scored, else all.
        window: tokens in a window; default as in the experiment that exported it.
        max_windows: score no more than this many windows or images.

    Raises:
        QawareError: damaged artifact, no tokenizer, unreadable or too short text, unreadable images.
    """
    artifact = Artifact.open(path)
    score = _images if "preprocessing" in artifact.metadata else _text
    values = score(artifact, data, window, max_windows).row()
    return {"model": path.name, "stage": artifact.runtime, "bytes": artifact.bytes, **values}


def _text(artifact: Artifact, data: str, window: int | None, max_windows: int | None) -> Score:
    from qaware.lm import TextDataModule

    path = artifact.path
    folder = artifact.metadata.get("tokenizer")
    if folder is None or "data" not in artifact.metadata or not (path.parent / folder).is_dir():
        raise QawareError(
            f"{path}: has neither tokenizer beside it and data in its sidecar nor preprocessing; only what "
            "an experiment exported with a TextDataModule or ImageDataModule can be evaluated"
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
        return score_language(runner, module.windows())


def _images(artifact: Artifact, data: str, window: int | None, max_images: int | None) -> Score:
    from qaware.vision import ImageDataModule

    if window is not None:
        raise QawareError(f"window: {window} is for text, and {artifact.path} takes images; leave it out")
    options: dict[str, Any] = {k: v for k, v in artifact.metadata.get("data", {}).items() if k in _CHOICE}
    options |= artifact.metadata["preprocessing"]
    module = ImageDataModule(data, val_source=data, max_images=max_images, **options)
    module.setup("validate")
    batches = list(module.val_dataloader())
    with IsolatedRunner(artifact) as runner:
        return score_classification(runner, [(images,) for images, _ in batches], [y for _, y in batches])
