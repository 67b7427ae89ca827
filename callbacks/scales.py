"""Learned scales inside a Trainer: when they begin, and that an optimizer trains them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from qaware.callbacks.averages import averages
from qaware.engines.learned import begin_alike, begin_grids, grids
from qaware.errors import QawareError
from qaware.recipe import Recipe

_PART = "_fake_quantizer.learned."
"""Of the names of their parameters, e.g. ``mlp.up.weight_fake_quantizer.learned.gain``."""


def begin_scales(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Find the scales that are not known yet, and those of averages; not in a forward pass, which may be of
    an average that a validation has swapped in."""
    if all(grid.known for grid in grids(pl_module)):
        return
    begin_grids(pl_module)
    for average in averages(trainer, pl_module):
        begin_alike(pl_module, average)


def report_idle(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Say which scales no optimizer has: one of hand-picked parameters leaves them out. Frozen ones, which a
    finetuning callback may add later, are meant to be."""
    trained = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    parameters = pl_module.named_parameters()
    idle = [n for n, p in parameters if _PART in n and p.requires_grad and id(p) not in trained]
    if idle:
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        rank_zero_info(
            f"qaware: no optimizer has {idle[0]}{more}, so these scales stay as they begin; give them to it "
            "in configure_optimizers, or use learning: none"
        )


def refuse_float_optimizer(pl_module: pl.LightningModule, checkpoint: dict[str, Any], recipe: Recipe) -> None:
    """Refuse to resume learned scales from float training: the state of its optimizer has no place for them.

    Raises:
        QawareError: says how the weights are loaded.
    """
    if recipe.learning == "none" or pl_module.trainer.state.fn != "fit":
        return
    if checkpoint.get("optimizer_states"):
        raise QawareError(
            f"checkpoint: is of float training, whose optimizer has no scales, and learning: "
            f"{recipe.learning!r} trains some; load its weights with "
            f"{type(pl_module).__name__}.load_from_checkpoint and fit without ckpt_path, or use learning: "
            "none"
        )
