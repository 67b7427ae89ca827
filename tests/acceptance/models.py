"""LightningModules of the kinds that users write, as small as they can be."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, CLASSES, PIXELS = 32, 32, 4, 16


class Body(nn.Module):
    """Embedding, one residual MLP and a head; keyword-only ids (B, T) and mask (B, T), a dict out."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False) if head else nn.Identity()

    def forward(
        self, *, ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        x = self.embed(ids)
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        return {"logits": self.head(x + scale * self.down(torch.relu(self.up(x))))}


class LitLM(pl.LightningModule):
    """Dict batch, keyword-only forward, dict output. ``losses`` has one entry a training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-2
        self.batch_size = 8
        self.losses: list[float] = []
        self.build()

    def build(self) -> None:
        self.body = Body()

    def forward(self, *, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return self.body(ids=ids, attention_mask=attention_mask)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self(ids=batch["ids"], attention_mask=batch["mask"])["logits"]
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch["ids"][:, 1:].reshape(-1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(ids=batch["ids"], attention_mask=batch["mask"])["logits"].argmax(-1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)]


class BuiltInSetup(LitLM):
    def build(self) -> None:
        self.body = None

    def setup(self, stage: str) -> None:
        if self.body is None:
            self.body = Body()


class BuiltInConfigureModel(LitLM):
    def build(self) -> None:
        self.body = None

    def configure_model(self) -> None:
        if self.body is None:
            self.body = Body()


class BuiltInParts(LitLM):
    """The head in ``__init__``, the rest in ``configure_model``."""

    def build(self) -> None:
        self.body = None
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def configure_model(self) -> None:
        if self.body is None:
            self.body = Body(head=False)

    def forward(self, *, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(ids=ids, attention_mask=attention_mask)["logits"])}


class Checkpointed(LitLM):
    """Recomputes its activations in the backward pass; ``reentrant`` None for not."""

    reentrant: bool | None = None

    def forward(self, *, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        if self.reentrant is None or not self.training:
            return super().forward(ids=ids, attention_mask=attention_mask)
        # Reentrant checkpoints take no keywords, and something that enters must need a gradient.
        needed = torch.ones((), requires_grad=True)
        return {"logits": checkpoint(self._logits, ids, attention_mask, needed, use_reentrant=self.reentrant)}

    def _logits(self, ids: Tensor, attention_mask: Tensor | None, needed: Tensor) -> Tensor:
        return self.body(ids=ids, attention_mask=attention_mask)["logits"]


class Hoarder(LitLM):
    """Keeps tensors that hang in the graph, as an attribute and in a list."""

    def build(self) -> None:
        super().build()
        self.kept: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.last = super().training_step(batch, batch_idx)
        self.last = self.loss(batch)
        self.kept.append(self.last * 2)
        return self.last


class Classifier(pl.LightningModule):
    """An MLP with batch norm; the step calls the submodule ``net``, never the module itself."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.losses: list[float] = []
        middle: list[nn.Module] = [nn.BatchNorm1d(WIDTH)] if norm else []
        self.net = nn.Sequential(
            nn.Linear(PIXELS, WIDTH),
            *middle,
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, CLASSES),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Gan(pl.LightningModule):
    """Two optimizers, stepped by hand; ``dis`` stays float when the target is ``gen``."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.losses: list[float] = []
        self.gen = nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PIXELS))
        self.dis = nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0]
        generator, discriminator = self.optimizers()
        made = self.gen(real.flip(0))
        ones = torch.ones(len(real), 1)
        self._step(generator, F.binary_cross_entropy_with_logits(self.dis(made), ones))
        both = self.dis(torch.cat([real, made.detach()]))
        self._step(discriminator, F.binary_cross_entropy_with_logits(both, torch.cat([ones, 0 * ones])))

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.gen(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.gen, self.dis)]
