"""Jobs that run in one or two processes; each returns plain data for ``test_distributed`` to compare.

As a script under ``torchrun`` it runs every job and writes ``rank0.json`` and ``rank1.json``.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import qaware
from qaware import PostTrainingQuantization
from qaware.observers import observers

from .data import Counting, images, sequences
from .models import Body, BuiltInConfigureModel, Classifier
from .runs import INT4, STATIC, make, qat, trainer


class Sharded(BuiltInConfigureModel):
    """FSDP2 on single layers and on the whole."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.body is None:
            torch.manual_seed(3)
            self.body = Body()
            mesh = self.device_mesh["data_parallel"]
            for part in (self.body.embed, self.body.down, self.body):
                fully_shard(part, mesh=mesh)


def rank() -> int:
    """As torchrun numbers it."""
    return int(os.environ.get("RANK", 0))


def strategy(world: int) -> dict[str, Any]:
    return {"devices": world, "strategy": "ddp" if world > 1 else "auto"}


def in_order(dataset: Any, world: int, batch_size: int) -> DataLoader[Any]:
    """The ranks' batches together are the batches of one process; Lightning's own sampler would shuffle."""
    sampler = DistributedSampler(dataset, world, rank() % world, shuffle=False)
    return DataLoader(dataset, batch_size=batch_size // world, sampler=sampler)


def skewed(world: int) -> DataLoader[Any]:
    """Every second sample is 5 times larger: the share of rank 1."""
    inputs, labels = images().dataset.tensors
    scale = torch.where(torch.arange(len(inputs)) % 2 == 1, 5.0, 1.0).unsqueeze(1)
    return in_order(TensorDataset(inputs * scale, labels), world, 16)


def train(world: int, folder: Path) -> dict[str, Any]:
    """QAT with static ranges on skewed data."""
    model = make(partial(Classifier, norm=False))
    export = ["tract"] if find_spec("tract") else []
    callback = qat(STATIC, target="net", export=export, score=True, output_dir=folder / f"train{world}")
    trainer(callback, **strategy(world)).fit(model, skewed(world), images(9))
    assert callback.result is not None
    return {
        "losses": model.losses,
        "ranges": [[o.min_val.item(), o.max_val.item()] for o in observers(model)],
        "weights": [p.double().sum().item() for p in model.parameters()],
        "stages": {stage: score.nats for stage, score in callback.result.scores.items()},
        "artifacts": list(callback.result.artifacts),
    }


def folded(world: int, folder: Path) -> dict[str, Any]:
    """QAT with a batch norm that is folded, on data that gives each rank other statistics."""
    model, callback = make(Classifier), qat(STATIC, target="net")
    trainer(callback, **strategy(world)).fit(model, skewed(world), images(9))
    assert callback.result is not None
    shipped = callback.result.model
    return {
        "norms": [name for name, module in shipped.module.named_modules() if isinstance(module, nn.Identity)],
        "integers": {name: weight.data.long().sum().item() for name, weight in shipped.weights.items()},
        "biases": [p.double().sum().item() for n, p in shipped.module.named_parameters() if "bias" in n],
    }


def score(world: int, folder: Path) -> dict[str, Any]:
    """61 sequences, which two ranks cannot share evenly; Lightning's sampler would repeat one."""
    data = DataLoader(Counting(5, 61, 8), batch_size=8)
    ptq = PostTrainingQuantization("int8-dynamic", output_dir=folder / f"score{world}")
    trainer(ptq, **strategy(world)).validate(make(), data, verbose=False)
    assert ptq.result is not None
    return {"losses": list(ptq.result.scores["converted"].losses)}


def score_shares(world: int, folder: Path) -> dict[str, Any]:
    """The user shards the data himself, unevenly."""
    share = Subset(Counting(5, 61, 8), range(rank(), 61, world))
    ptq = PostTrainingQuantization("int8-dynamic", output_dir=folder / f"shares{world}")
    run = trainer(ptq, use_distributed_sampler=False, **strategy(world))
    run.validate(make(), DataLoader(share, batch_size=8), verbose=False)
    assert ptq.result is not None
    return {"nats": ptq.result.scores["converted"].nats, "count": sum(ptq.result.scores["converted"].counts)}


def calibrate(world: int, folder: Path) -> dict[str, Any]:
    """Ranges of PTQ, on training data that is shuffled."""
    found = {}
    for observer in ("minmax", "histogram"):
        scheme = {"bits": 8, "activation": "int8-static", "observer": observer}
        recipe = {"name": observer, "rules": [{"type": "Linear", "scheme": scheme}]}
        data = DataLoader(skewed(1).dataset, batch_size=16, shuffle=True)
        ptq = PostTrainingQuantization(
            recipe, "net", calibration=data, calibration_batches=5, output_dir=folder / f"{observer}{world}"
        )
        trainer(ptq, **strategy(world)).validate(make(Classifier), images(9), verbose=False)
        assert ptq.result is not None
        activations = ptq.result.model.activations.items()
        found[observer] = {name: [r.scale, r.zero_point] for name, r in activations}
    return found


def replicate(world: int, folder: Path) -> dict[str, Any]:
    """What ``shard`` trains, without sharding."""
    model = make()
    callback = qat(INT4, score=True, output_dir=folder / "replicate")
    trainer(callback, **strategy(world)).fit(model, in_order(Counting(0, 48, 8), world, 8), sequences(9))
    return {"losses": model.losses}


def shard(world: int, folder: Path) -> dict[str, Any]:
    """FSDP2, stopped after an epoch and resumed, with whole and with sharded checkpoints."""
    found: dict[str, Any] = {}
    for saved in ("sharded", "whole"):
        here = folder / saved
        keep = ModelCheckpoint(dirpath=here, save_last=True, every_n_epochs=1)
        whole, callback = _fit_sharded(here, saved, 2, keep)
        first, _ = _fit_sharded(
            here / "first", saved, 1, ModelCheckpoint(dirpath=here / "first", save_last=True)
        )
        second, _ = _fit_sharded(here / "second", saved, 2, None, here / "first" / "last.ckpt")
        assert callback.result is not None
        found[saved] = {
            "losses": whole.losses,
            "resumed": first.losses + second.losses,
            "stages": {stage: s.nats for stage, s in callback.result.scores.items()},
            "logged": whole.trainer.callback_metrics["val_loss"].item(),
            "validated": _validate_sharded(saved, here / "last.ckpt"),
        }
    return found


def _fit_sharded(folder: Path, saved: str, epochs: int, keep: Any, resume: Path | None = None) -> Any:
    model = Sharded()
    callback = qat(INT4, score=True, output_dir=folder / "out")
    run = trainer(callback, *([keep] if keep else []), max_epochs=epochs, **_fsdp(saved))
    run.fit(model, in_order(Counting(0, 48, 8), 2, 8), sequences(9), ckpt_path=resume)
    return model, callback


def _validate_sharded(saved: str, path: Path) -> Any:
    """In fresh objects: refused until the model is prepared."""
    try:
        trainer(qat(INT4), **_fsdp(saved)).validate(Sharded(), sequences(9), ckpt_path=path, verbose=False)
        refused = None
    except Exception as error:
        refused = str(error)
    model = qaware.prepare(Sharded(), INT4)
    value = trainer(**_fsdp(saved)).validate(model, sequences(9), ckpt_path=path, verbose=False)
    return refused, value[0]["val_loss"]


def _fsdp(saved: str) -> dict[str, Any]:
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    plan = ModelParallelStrategy(**sizes, save_distributed_checkpoint=saved == "sharded")
    return {"devices": 2, "strategy": plan}


JOBS = {f.__name__: f for f in (train, folded, score, score_shares, calibrate, replicate)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    folder, names = Path(sys.argv[1]), sys.argv[2:] or [*JOBS, "shard"]
    results = {name: {**JOBS, "shard": shard}[name](2, folder) for name in names}
    (folder / f"rank{rank()}.json").write_text(json.dumps(results))
