"""The Lightning callbacks, imported as ``qaware.callbacks``."""

from __future__ import annotations

from qaware.callbacks.prepared import convert, load_from_checkpoint, prepare
from qaware.callbacks.ptq import PostTrainingQuantization
from qaware.callbacks.qat import QuantizationAwareTraining

__all__ = [
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "convert",
    "load_from_checkpoint",
    "prepare",
]
