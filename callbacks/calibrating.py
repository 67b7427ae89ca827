"""Calibration batches on their way through the user's own validation step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader

from qaware.calibration import Look, Share
from qaware.calibration_checks import step_failed


class CalibrationStep(pl.Callback):
    """Advances a bar after every batch, and knows the one under way; a batch that is only there to keep ranks
    together is not observed."""

    def __init__(self, shares: list[Share], look: Look, advance: Callable[[], None]) -> None:
        self.shares = shares
        self.look = look
        self.advance = advance
        self.number = 0
        self.batch: Any = None

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        share = self.shares[dataloader_idx]
        self.number, self.batch = share.number(batch_idx), batch
        self.look(batch_idx not in share.repeats)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.look.done(self.number, self.batch)
        self.batch = None
        self.advance()

    def failed(self, example: Any, error: Exception) -> str:
        """What is said when the loop raised ``error``; ``example`` are tensors that the model takes."""
        if self.batch is not None:
            return step_failed("validation_step", self.number, self.batch, example, error)
        said = " ".join(str(error).split())
        return (
            f"calibration: the validation loop failed between batches ({said}); repair the loader or the hook"
        )


def shared(loader: Any, count: int) -> tuple[list[Share], CombinedLoader]:
    """Every loader in the collection that ``Trainer.validate`` takes becomes this rank's share of it."""
    if isinstance(loader, (list, tuple)) and not any(
        isinstance(item, (DataLoader, CombinedLoader)) for item in loader
    ):
        # Batches, each of which Lightning would take for a loader.
        loader = DataLoader(loader, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "sequential")
    leaves, structure = tree_flatten(combined.iterables)
    shares = [Share(leaf, count) for leaf in leaves]
    return shares, CombinedLoader(tree_unflatten(shares, structure), combined._mode)
