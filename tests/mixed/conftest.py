"""A language model of two blocks with a tied head, trained for a moment, and its windows."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qaware.metrics.windows import Windows
from qaware.tasks import LanguageTask, language_signature

VOCABULARY, WIDTH, LENGTH = 24, 32, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # The mean of what was seen so far: order matters, and no later token is looked at.
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.down(torch.relu(self.up(past + x)))


class Tiny(pl.LightningModule):
    """Token ids (B, T) to logits (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)


def tokens(rows: int, seed: int) -> Tensor:
    """(rows, LENGTH) int64: each token follows from the one before, mostly."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randint(VOCABULARY, (rows,), generator=generator)]
    for _ in range(LENGTH - 1):
        noise = torch.randint(VOCABULARY, (rows,), generator=generator)
        keep = torch.rand(rows, generator=generator) < 0.85
        found.append(torch.where(keep, (found[-1] * 5 + 3) % VOCABULARY, noise))
    return torch.stack(found, 1)


@pytest.fixture(scope="session")
def _trained() -> Tiny:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = tokens(64, 1)
    for _ in range(60):
        logits = model(data)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def tiny(_trained: Tiny) -> Iterator[Tiny]:
    """The trained model; a test that leaves it changed fails."""
    before = {key: value.clone() for key, value in _trained.state_dict().items()}
    classes = [type(module) for module in _trained.modules()]
    yield _trained
    assert list(_trained.state_dict()) == list(before)
    assert [type(module) for module in _trained.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in _trained.state_dict().items())


@pytest.fixture
def task() -> LanguageTask:
    ids = tokens(24, 2)
    windows = Windows(tuple(ids), (1,) * len(ids), None, "none", LENGTH, LENGTH, False)
    return LanguageTask(windows, language_signature("input_ids", VOCABULARY, LENGTH))


@pytest.fixture
def loader() -> DataLoader[Tensor]:
    return DataLoader(tokens(24, 2), batch_size=8)  # type: ignore[arg-type]
