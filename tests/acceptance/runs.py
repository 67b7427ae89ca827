"""Run Trainers quietly, and compare what two of them leave behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn
from torch.utils._pytree import tree_flatten_with_path
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear

from qaware import QuantizationAwareTraining
from qaware.engines.static_layers import FakeQuantizedLayer

from .data import sequences
from .models import LitLM

INT4, STATIC = "int8-dynamic-int4-weight", "int8-static"
EPOCH_END = 0
Callbacks = Callable[[], Sequence[pl.Callback]]


def qat(recipe: str = INT4, **options: Any) -> QuantizationAwareTraining:
    """Without scores, which most cases are not about."""
    return QuantizationAwareTraining(recipe, **{"score": False, **options})


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def make(cls: type[Any] = LitLM, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return cls()


def validate(module: pl.LightningModule, loader: Any = None, **options: Any) -> float:
    """The validation loss, by a Trainer of its own."""
    run = trainer(inference_mode=False, **options)
    return run.validate(module, loader or sequences(9), verbose=False)[0]["val_loss"]


def fake_quantized(module: nn.Module) -> set[str]:
    kinds = (FakeQuantizedLinear, FakeQuantizedEmbedding, FakeQuantizedLayer)
    return {name for name, m in module.named_modules() if isinstance(m, kinds)}


def integers(module: nn.Module) -> set[str]:
    return {
        n
        for n, p in module.named_parameters()
        if isinstance(p, IntxUnpackedToInt8Tensor) or p.dtype == torch.int8
    }


@dataclass
class Outcome:
    """What a run leaves: the loss of each training batch, and the tensors of its checkpoint."""

    losses: list[float]
    state: dict[str, Any]


def outcome(run: pl.Trainer, module: Any, folder: Path) -> Outcome:
    """Through the file of a checkpoint, which must load without running code."""
    path = folder / "outcome.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state")
    leaves, _ = tree_flatten_with_path({part: saved[part] for part in parts if part in saved})
    return Outcome(list(module.losses), {str(path): value for path, value in leaves})


def different(a: Outcome, b: Outcome) -> list[str]:
    """Where two runs differ in any bit of their state."""
    names = sorted(set(a.state) ^ set(b.state))
    return names + [n for n in a.state if n in b.state and not _equal(a.state[n], b.state[n])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.eq(a, b).all())
    return bool(a == b)


def require_exact_resume(
    cls: type[Any],
    callbacks: Callbacks,
    folder: Path,
    stop: int = EPOCH_END,
    train: Callable[[], Any] = sequences,
    val: Callable[[], Any] = sequences,
    **options: Any,
) -> Outcome:
    """Stop at optimizer step ``stop`` (or when the first epoch is over and validated), resume in fresh
    objects under another seed: every bit as if it had not stopped. Returns what the whole run left."""
    whole = make(cls)
    run = trainer(*callbacks(), **options)
    run.fit(whole, train(), val())
    expected = outcome(run, whole, folder)
    first = make(cls)
    keep = _keep(folder / "kept", None if stop == EPOCH_END else stop)
    until = {"max_epochs": 1} if stop == EPOCH_END else {"max_steps": stop}
    trainer(*callbacks(), keep, **{**options, **until}).fit(first, train(), val())
    second = make(cls, seed=77)
    run = trainer(*callbacks(), **options)
    run.fit(second, train(), val(), ckpt_path=folder / "kept" / "last.ckpt")
    assert first.losses + second.losses == expected.losses
    assert 0 < len(first.losses) < len(expected.losses), "it did not stop in between"
    assert different(expected, outcome(run, second, folder)) == []
    return expected


def _keep(folder: Path, steps: int | None) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, every_n_train_steps=steps, save_top_k=-1, save_last=True)
