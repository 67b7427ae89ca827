"""Batch norms in quantization-aware training: when they stop moving, and whose statistics ship."""

from __future__ import annotations

import lightning.pytorch as pl
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qaware.errors import QawareError
from qaware.plan import Plan


def freeze_batch_norm(model: nn.Module) -> None:
    """Normalize with the running statistics and leave them alone, until ``model.train()`` is called again."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def share_statistics(pl_module: pl.LightningModule) -> None:
    """Give every rank the statistics of the first, as DDP does before each forward pass, so that all convert
    the same model."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm):
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)


def refuse_sync(trainer: pl.Trainer, plan: Plan) -> None:
    """Refuse ``sync_batchnorm=True`` where batch norms are folded: it replaces them by other modules.

    Raises:
        QawareError: names the first such norm and the way out.
    """
    folded = [] if plan.layout is None else [s.batch_norm for s in plan.layout.layers if s.batch_norm]
    if folded and trainer._accelerator_connector._layer_sync is not None:
        raise QawareError(
            f"sync_batchnorm: {folded[0]} is folded into the layer before it, and Lightning would replace "
            "it; use sync_batchnorm=False, and freeze_batch_norm_step= to go on with running statistics"
        )
