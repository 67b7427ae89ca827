"""Image classifiers for a Lightning Trainer: small convolution networks and the images to train them on.

The names are looked up on first use, so that ``import qaware.vision`` stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaware.vision.data import ImageDataModule
    from qaware.vision.image_classifier import ImageClassifier

__all__ = ["ImageClassifier", "ImageDataModule"]

_HOMES = {"ImageClassifier": "qaware.vision.image_classifier", "ImageDataModule": "qaware.vision.data"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
