"""Give a module the structure that a checkpoint's weights were trained in."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from qaware.calibration import refuse_several_passes
from qaware.callbacks.data import find_target
from qaware.callbacks.state import (
    KEY,
    PREPARED,
    QuantizationState,
    get_state,
    require_same_recipe,
    set_state,
)
from qaware.engines.choose import engine_for
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.learned import learn_grids
from qaware.errors import QawareError
from qaware.layout import Layout
from qaware.plan import Plan
from qaware.recipe import Recipe


def apply_plan(pl_module: pl.LightningModule, plan: Plan, target: str | None) -> None:
    """Prepare the planned layers for training and remember how."""
    refuse_several_passes(plan)
    model = find_target(pl_module, target)
    engine_for(plan).prepare(model, plan)
    learn_grids(model, plan)
    set_state(pl_module, QuantizationState(PREPARED, plan, target))


def restore_structure(pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Prepare ``pl_module`` as the checkpoint says, so that its weights fit."""
    saved = checkpoint.get(KEY)
    if saved is None:
        return
    recipe, target = Recipe.from_dict(saved["recipe"]), saved["target"]
    state = get_state(pl_module)
    if state is None:
        plan = recipe.match(find_target(pl_module, target))
        layout = saved.get("layout")
        plan = plan.with_layout(None if layout is None else Layout.from_dict(layout))
        apply_plan(pl_module, plan, target)
    else:
        require_same_recipe("checkpoint", recipe, target, state.plan.recipe, state.target)
    fake_quant = saved.get("fake_quant", True)
    set_fake_quant(pl_module, fake_quant)
    if not fake_quant:
        rank_zero_info("qaware: the checkpoint is from before start_step, so its forward pass does not round")


def require_in_time(pl_module: pl.LightningModule) -> None:
    """Refuse to prepare ``pl_module`` where its weights are loaded already.

    Raises:
        QawareError: names the strategy and what to call first.
    """
    strategy = pl_module.trainer.strategy
    if strategy.restore_checkpoint_after_setup and get_state(pl_module) is None:
        raise QawareError(
            f"checkpoint: was prepared by qaware, and {type(strategy).__name__} loads the weights before a "
            "callback can prepare the model for them; call qaware.prepare(model, recipe, target) first"
        )


def add_missing_keys(pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """A float checkpoint knows no fake-quantizers; fresh ones stand in, so that loading stays strict. An
    averaging callback saves the model twice."""
    for part in ("state_dict", "current_model_state"):
        for name, tensor in pl_module.state_dict().items() if part in checkpoint else ():
            if "_fake_quantizer." in name:
                checkpoint[part].setdefault(name, tensor)
