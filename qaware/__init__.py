"""qaware: quantization for PyTorch Lightning, scored on every runtime it ships to.

Public names are imported on first use, so that ``import qaware`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaware.callbacks import (
        PostTrainingQuantization,
        QuantizationAwareTraining,
        convert,
        load_from_checkpoint,
        prepare,
    )
    from qaware.errors import ParityError, QawareError, RuntimeDiedError
    from qaware.plan import Decision, Plan
    from qaware.recipe import Recipe, Rule, recipe_names
    from qaware.scheme import Scheme

from qaware import quiet

__version__ = "0.1.0"

quiet.install()

_HOME = {
    "Decision": "qaware.plan",
    "ParityError": "qaware.errors",
    "Plan": "qaware.plan",
    "PostTrainingQuantization": "qaware.callbacks",
    "QawareError": "qaware.errors",
    "QuantizationAwareTraining": "qaware.callbacks",
    "Recipe": "qaware.recipe",
    "Rule": "qaware.recipe",
    "RuntimeDiedError": "qaware.errors",
    "Scheme": "qaware.scheme",
    "convert": "qaware.callbacks.prepared",
    "load_from_checkpoint": "qaware.callbacks.prepared",
    "prepare": "qaware.callbacks.prepared",
    "recipe_names": "qaware.recipe",
}

__all__ = [
    "Decision",
    "ParityError",
    "Plan",
    "PostTrainingQuantization",
    "QawareError",
    "QuantizationAwareTraining",
    "Recipe",
    "Rule",
    "RuntimeDiedError",
    "Scheme",
    "convert",
    "load_from_checkpoint",
    "prepare",
    "recipe_names",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'qaware' has no attribute {name!r}")
