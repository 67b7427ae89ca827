"""What a prepared module remembers of its preparation, and what a checkpoint says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from qaware.errors import QawareError
from qaware.plan import Plan
from qaware.recipe import Recipe

KEY = "qaware"
VERSION = 1
PREPARED = "prepared"


@dataclass(frozen=True)
class QuantizationState:
    """Kept as the plain attribute ``qaware_state`` of the LightningModule, not of the callback: one callback
    can serve two modules, and one module can meet two callbacks."""

    phase: str
    plan: Plan
    target: str | None


def get_state(pl_module: pl.LightningModule) -> QuantizationState | None:
    """The state of a prepared module; None for a float one."""
    return getattr(pl_module, "qaware_state", None)


def set_state(pl_module: pl.LightningModule, state: QuantizationState) -> None:
    """Remember how ``pl_module`` was prepared."""
    object.__setattr__(pl_module, "qaware_state", state)


def to_checkpoint(state: QuantizationState) -> dict[str, Any]:
    """Plain data, so that the whole checkpoint loads with ``weights_only=True``."""
    return {
        "version": VERSION,
        "phase": state.phase,
        "recipe": state.plan.recipe.to_dict(),
        "recipe_hash": state.plan.recipe.hash,
        "target": state.target,
    }


def require_same_recipe(saved: dict[str, Any], recipe: Recipe) -> None:
    """Refuse to continue a checkpoint under another recipe.

    Raises:
        QawareError: names both recipes and the two ways out.
    """
    if saved["recipe_hash"] != recipe.hash:
        raise QawareError(
            f"checkpoint: was trained under recipe {saved['recipe']['name']!r} ({saved['recipe_hash']}), the "
            f"callback has {recipe.name!r} ({recipe.hash}); give the callback that recipe, or start from a "
            "float checkpoint"
        )
