"""Started as a process of its own: ``python -m acceptance.child KIND FOLDER STEP`` trains, writes a
checkpoint every 3 steps, and kills itself with SIGKILL after STEP."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from qaware.lm import CausalLM, TextDataModule

from .data import sequences
from .models import LitLM
from .runs import STATIC, make, qat, trainer

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
SCHEDULE = {"start_step": 4, "freeze_observers_step": 11}


class Text(CausalLM):
    """The language model of the library, made as the other modules here are."""

    def __init__(self) -> None:
        super().__init__(LLAMA, lr=1e-2)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


class Killed(pl.Callback):
    """What a machine does that loses power."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def text(folder: Path) -> TextDataModule:
    """9 batches an epoch."""
    source = folder / "text.txt"
    source.write_text("\n".join(f"{i} and {i * i % 7} make {i + i * i % 7}." for i in range(80)))
    return TextDataModule(
        str(source),
        tokenizer=300,
        block_size=16,
        batch_size=4,
        cache_dir=str(folder / "cache"),
        val_fraction=0.2,
    )


def begin(kind: str, folder: Path, seed: int = 3) -> tuple[Any, dict[str, Any]]:
    """A module, and the data as arguments of ``Trainer.fit``."""
    if kind == "text":
        return make(Text, seed), {"datamodule": text(folder)}
    return make(LitLM, seed), {"train_dataloaders": sequences(), "val_dataloaders": sequences(9)}


def main(kind: str, folder: Path, step: int) -> None:
    module, data = begin(kind, folder)
    keep = ModelCheckpoint(dirpath=folder / "kept", every_n_train_steps=3, save_top_k=-1, save_last=True)
    trainer(qat(STATIC, convert=False, **SCHEDULE), keep, Killed(step), max_epochs=2).fit(module, **data)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
