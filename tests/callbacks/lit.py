"""Small LightningModules and data for the callbacks' tests."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

VOCAB, LENGTH = 64, 16


class Body(nn.Module):
    """Embedding, one residual MLP and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, VOCAB, bias=False)

    def forward(self, *, ids: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.embed(ids)
        return {"logits": self.head(x + self.down(torch.relu(self.up(x))) * scale)}


class LitLM(pl.LightningModule):
    """Keyword-only forward, dict output, and optionally built late."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        self.lr = 1e-2
        self.losses: list[float] = []
        self.flags: list[bool] = []
        self.body: Body | None = None if lazy else Body()

    def configure_model(self) -> None:
        if self.body is None:
            self.body = Body()

    def forward(self, *, ids: Tensor) -> dict[str, Tensor]:
        assert self.body is not None
        return self.body(ids=ids)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self(ids=batch["ids"])["logits"]
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch["ids"][:, 1:].reshape(-1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.body is not None
        quantizer = getattr(self.body.up, "weight_fake_quantizer", None)
        self.flags.append(bool(getattr(quantizer, "enabled", False)))
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Sgd(LitLM):
    """Plain gradient descent."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Counting(Dataset[dict[str, Tensor]]):
    """Arithmetic sequences modulo the vocabulary."""

    def __init__(self, seed: int, count: int = 32) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(0, VOCAB, (count, 1), generator=generator)
        self.ids = (start + 3 * torch.arange(LENGTH)) % VOCAB

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ids": self.ids[index]}


def loader(seed: int = 0) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Counting(seed), batch_size=8)


class LitClassifier(pl.LightningModule):
    """The step calls the submodule ``net``, never the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def images(seed: int = 0, scale: float = 1.0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (64,), generator=generator)
    inputs = torch.randn(64, 16, generator=generator) * 0.3
    inputs[torch.arange(64), labels] += 2
    return DataLoader(TensorDataset(inputs * scale, labels), batch_size=16)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
    }
    return pl.Trainer(**{**quiet, **options})
