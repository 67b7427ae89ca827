"""The Lightning callbacks, imported as ``qaware.callbacks``."""

from __future__ import annotations

from qaware.callbacks.ptq import PostTrainingQuantization
from qaware.callbacks.qat import QuantizationAwareTraining

__all__ = ["PostTrainingQuantization", "QuantizationAwareTraining"]
