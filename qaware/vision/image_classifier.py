"""An image classifier as a LightningModule: train it, score it, quantize it, export it."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.errors import QawareError
from qaware.vision.checkpoints import load_weights
from qaware.vision.networks import build_network

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")
_MOMENTUM = 0.9


class ImageClassifier(pl.LightningModule):
    """Cross-entropy on labelled images, with any network that turns images into logits.

    Batches are ``(images, labels)``: float32 (B, C, H, W), normalized, and int64 (B,).

    Args:
        network: the name of a built-in network, ``cifar-resnet`` or ``small-cnn``; the same with its
            arguments, ``{"name": "cifar-resnet", "depth": 20, "classes": 10}``; or a module.
        checkpoint: file of weights for it, a state dict or a checkpoint that has one; keys may carry the
            prefix ``module.``. It is read with ``weights_only=True``, and every key must fit.
        lr: learning rate, after the warmup.
        optimizer: ``sgd`` (Nesterov momentum of 0.9) or ``adamw``.
        weight_decay: for weights of two dimensions or more; biases and norms are not decayed.
        schedule: ``cosine``, down to zero at the Trainer's last step, or ``constant``.
        warmup_steps: optimizer steps over which the learning rate rises linearly; 0 for none.

    Raises:
        QawareError: no such network, optimizer or schedule, or a checkpoint that does not fit.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module = "small-cnn",
        checkpoint: str | None = None,
        lr: float = 0.1,
        optimizer: str = "sgd",
        weight_decay: float = 5e-4,
        schedule: str = "cosine",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        _one_of("optimizer", optimizer, OPTIMIZERS)
        _one_of("schedule", schedule, SCHEDULES)
        # A module is no plain data; load_from_checkpoint(path, network=...) gets it again.
        self.save_hyperparameters(ignore=["network"] if isinstance(network, nn.Module) else [])
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.network = network if isinstance(network, nn.Module) else build_network(network)
        if checkpoint is not None:
            load_weights(self.network, checkpoint)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float (B, classes), for float images (B, C, H, W)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Mean loss in nats, a float32 scalar; logs ``train_loss`` and ``train_accuracy``."""
        return self._step("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        """Logs ``val_loss`` and ``val_accuracy``, the means over images."""
        self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        """Logs ``test_loss`` and ``test_accuracy``, the means over images."""
        self._step("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """The likeliest class of each image, int64 (B,)."""
        logits: Tensor = self(batch[0])
        return logits.argmax(-1)

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits.float(), labels)
        figures = {f"{stage}_loss": loss, f"{stage}_accuracy": (logits.argmax(-1) == labels).float().mean()}
        self.log_dict(figures, prog_bar=True, batch_size=len(labels), sync_dist=stage != "train")
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer and the schedule of the constructor, by step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if self.hparams["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=_MOMENTUM, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.lr)
        factor = self._cosine() if self.hparams["schedule"] == "cosine" else lambda step: 1.0
        warmup = max(self.warmup_steps, 1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(step) * min(1.0, (step + 1) / warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _cosine(self) -> Any:
        """Half a cosine over all steps of the Trainer (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise QawareError(
                "schedule: 'cosine' needs a last step; set max_steps or max_epochs, or constant"
            )
        return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))

    def setup(self, stage: str) -> None:
        """Refuse images that a built-in network cannot take, before anything is trained on them."""
        data: Any = getattr(self.trainer, "datamodule", None)
        for key in ("channels", "classes"):
            own, given = getattr(self.network, key, None), getattr(data, key, None)
            fits = own is None or given is None or (given == own if key == "channels" else given <= own)
            if not fits:
                raise QawareError(
                    f"{key}: the images have {given} and the network {own}; "
                    f"set the network's {key} to {given}, or give the data module {key}: {own}"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the name of the first weights out, so that the checkpoint loads without that file."""
        checkpoint["hyper_parameters"]["checkpoint"] = None


def _one_of(key: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise QawareError(f"{key}: {value!r} is not one of {', '.join(legal)}")
