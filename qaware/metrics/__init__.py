"""Scores of a language model or a classifier, with the protocol they were measured under.

Importing this package is cheap: torch and evaluate are only imported when a name that needs them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaware.metrics.classification import score_classification
    from qaware.metrics.hub import load_metric
    from qaware.metrics.language import score_language
    from qaware.metrics.score import Score, paired
    from qaware.metrics.windows import Windows

__all__ = ["Score", "Windows", "load_metric", "paired", "score_classification", "score_language"]

_MODULES = {
    "Score": "score",
    "Windows": "windows",
    "load_metric": "hub",
    "paired": "score",
    "score_classification": "classification",
    "score_language": "language",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
