"""The training loader of ``TextDataModule`` goes on where a checkpoint left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qaware.lm import batches
from qaware.lm.cache import Stream
from qaware.resumable import ResumableLoader, Shuffled

STREAM = Stream(np.arange(48, dtype=np.int32), np.ones(48, dtype=np.int32), np.array([48]))


def loader(**options: Any) -> ResumableLoader:
    """6 batches of 2 windows of 4 tokens."""
    part = batches.Part(STREAM, batches.cut(STREAM, 4, "packed"))
    return ResumableLoader(part, batch_size=2, sampler=Shuffled(part, 0), collate_fn=batches.stack, **options)


def firsts(found: Any) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in found]


def test_it_goes_on_after_the_batches_that_were_seen() -> None:
    whole = firsts(loader())
    stopped = loader()
    iterator = iter(stopped)
    assert firsts([next(iterator), next(iterator)]) == whole[:2]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert firsts(resumed) == whole[2:]
    assert firsts(resumed) == whole, "only the first iteration leaves batches out"


def test_another_epoch_is_whole() -> None:
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batches": 2})
    resumed.sampler.set_epoch(1)
    assert len(firsts(resumed)) == 6


class Reader(pl.LightningModule):
    """Notes what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read: list[list[int]] = []

    def training_step(self, batch: batches.Batch, batch_idx: int) -> torch.Tensor:
        self.read += firsts([batch])
        return self.weight.square()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7])
def test_a_trainer_reads_each_batch_once(stop: int, options: dict[str, Any], tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=stop, save_last=True, save_top_k=-1)
    runs: list[list[list[int]]] = []
    for settings in ({}, {"max_steps": stop, "callbacks": [keep]}, {}):
        path = tmp_path / "last.ckpt" if len(runs) == 2 else None
        module = Reader()
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing="callbacks" in settings,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=3,
            **options,
            **settings,
        )
        trainer.fit(module, loader(), ckpt_path=path)
        runs.append(module.read)
    whole, stopped, resumed = runs
    assert stopped + resumed == whole
    assert 0 < len(stopped) < len(whole)


def test_workers_read_ahead_but_only_what_was_given_counts() -> None:
    whole = firsts(loader())
    ahead = loader(num_workers=1, persistent_workers=True)
    assert firsts([next(iter(ahead))]) == whole[:1]
    assert ahead.state_dict() == {"epoch": 0, "batches": 1}
    ahead.load_state_dict(ahead.state_dict())
    assert firsts(ahead) == whole[1:]
