"""qaware: quantization for PyTorch Lightning, scored on every runtime it ships to.

Public names are imported on first use, so that ``import qaware`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaware.api import quantize
    from qaware.callbacks import (
        PostTrainingQuantization,
        QuantizationAwareTraining,
        convert,
        load_from_checkpoint,
        prepare,
    )
    from qaware.engines.base import QuantizedModel
    from qaware.errors import ParityError, QawareError, RuntimeDiedError
    from qaware.exporters.isolated import open_artifact
    from qaware.generating import generate
    from qaware.layers import LayerReport, layer_report
    from qaware.level_plugins import register_levels
    from qaware.mixed.api import search, sensitivity
    from qaware.plan import Decision, Plan
    from qaware.recipe import Recipe, Rule
    from qaware.rounding_plugins import register_rounding
    from qaware.scheme import Scheme
    from qaware.shipped import recipe_names
    from qaware.storage import load_quantized

from qaware import quiet

__version__ = "0.1.0"

quiet.install()

_HOME = {
    "Decision": "qaware.plan",
    "LayerReport": "qaware.layers",
    "ParityError": "qaware.errors",
    "Plan": "qaware.plan",
    "PostTrainingQuantization": "qaware.callbacks",
    "QawareError": "qaware.errors",
    "QuantizationAwareTraining": "qaware.callbacks",
    "QuantizedModel": "qaware.engines.base",
    "Recipe": "qaware.recipe",
    "Rule": "qaware.recipe",
    "RuntimeDiedError": "qaware.errors",
    "Scheme": "qaware.scheme",
    "convert": "qaware.callbacks.prepared",
    "generate": "qaware.generating",
    "layer_report": "qaware.layers",
    "load_from_checkpoint": "qaware.callbacks.prepared",
    "load_quantized": "qaware.storage",
    "open_artifact": "qaware.exporters.isolated",
    "prepare": "qaware.callbacks.prepared",
    "quantize": "qaware.api",
    "recipe_names": "qaware.shipped",
    "register_levels": "qaware.level_plugins",
    "register_rounding": "qaware.rounding_plugins",
    "search": "qaware.mixed.api",
    "sensitivity": "qaware.mixed.api",
}

__all__ = [
    "Decision",
    "LayerReport",
    "ParityError",
    "Plan",
    "PostTrainingQuantization",
    "QawareError",
    "QuantizationAwareTraining",
    "QuantizedModel",
    "Recipe",
    "Rule",
    "RuntimeDiedError",
    "Scheme",
    "convert",
    "generate",
    "layer_report",
    "load_from_checkpoint",
    "load_quantized",
    "open_artifact",
    "prepare",
    "quantize",
    "recipe_names",
    "register_levels",
    "register_rounding",
    "search",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'qaware' has no attribute {name!r}")
