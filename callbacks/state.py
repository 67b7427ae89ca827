"""What a prepared module remembers of its preparation, and what a checkpoint says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from qaware.callbacks.hooks import override
from qaware.engines.fake_quant import is_rounding
from qaware.errors import QawareError
from qaware.plan import Plan
from qaware.recipe import Recipe

KEY = "qaware"
VERSION = 1
PREPARED = "prepared"
CONVERTED = "converted"


@dataclass(frozen=True)
class QuantizationState:
    """Kept as the plain attribute ``qaware_state`` of the LightningModule, not of the callback: one callback
    can serve two modules, and one module can meet two callbacks."""

    phase: str
    plan: Plan
    target: str | None


def get_state(pl_module: pl.LightningModule) -> QuantizationState | None:
    """The state of a prepared or converted module; None for a float one."""
    return getattr(pl_module, "qaware_state", None)


def set_state(pl_module: pl.LightningModule, state: QuantizationState) -> None:
    """Remember how ``pl_module`` was prepared, and mark every checkpoint of it from now on."""
    object.__setattr__(pl_module, "qaware_state", state)
    override(pl_module, "on_save_checkpoint", _mark)


def _mark(pl_module: pl.LightningModule, original: Any, checkpoint: dict[str, Any]) -> None:
    """Plain data, so that the whole checkpoint loads with ``weights_only=True``."""
    state = get_state(pl_module)
    assert state is not None
    if state.phase == CONVERTED:
        raise QawareError(
            f"{type(pl_module).__name__}: is converted, and Lightning cannot load such a checkpoint; "
            "save it with QuantizedModel.save() and read it with qaware.load_quantized()"
        )
    checkpoint[KEY] = {
        "version": VERSION,
        "phase": state.phase,
        "recipe": state.plan.recipe.to_dict(),
        "recipe_hash": state.plan.recipe.hash,
        "target": state.target,
        "layout": None if state.plan.layout is None else state.plan.layout.to_dict(),
        "fake_quant": is_rounding(pl_module),
    }
    original(checkpoint)


def require_same_recipe(
    name: str, saved: Recipe, saved_target: str | None, recipe: Recipe, target: str | None
) -> None:
    """Refuse to go on with ``name`` (a checkpoint or a module) under another recipe or target.

    Raises:
        QawareError: names both and the two ways out.
    """
    if saved.hash != recipe.hash:
        raise QawareError(
            f"{name}: was prepared under recipe {saved.name!r} ({saved.hash}), now it is {recipe.name!r} "
            f"({recipe.hash}){_difference(saved, recipe)}; give that recipe, or start from a float {name}"
        )
    if saved_target != target:
        raise QawareError(
            f"{name}: was prepared with target {saved_target!r}, now it is {target!r}; give that target, or "
            f"start from a float {name}"
        )


def _difference(saved: Recipe, recipe: Recipe) -> str:
    """The first rule whose grid is another one, or how integers or scales are found otherwise; with both."""
    for theirs, ours in zip(saved.rules, recipe.rules, strict=False):
        if theirs != ours:
            grids = [
                f"{rule.label} {rule.scheme.label if rule.scheme else 'float'}" for rule in (theirs, ours)
            ]
            return f": {grids[0]} there, {grids[1]} here"
    for key in ("learning", "rounding"):
        if (there := getattr(saved, key)) != (here := getattr(recipe, key)):
            return f": {key} {there!r} there, {here!r} here"
    return ""


def require_trainable(pl_module: pl.LightningModule) -> None:
    """Refuse a converted module.

    Raises:
        QawareError: says what to train instead.
    """
    state = get_state(pl_module)
    if state is not None and state.phase == CONVERTED:
        raise QawareError(
            f"{type(pl_module).__name__}: is converted, and integers cannot be trained or quantized again; "
            "use the module that was given to the Trainer, which stays trainable"
        )
