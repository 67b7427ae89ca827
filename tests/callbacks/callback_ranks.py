"""What ``test_ddp`` runs in one and in two processes; each job returns plain data or tensors.

As a script it is two processes on gloo, which run every job and write ``rank0.pt`` and ``rank1.pt``.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lit import Counting, LitClassifier, LitLM, Sgd, images, loader, trainer
from torch.utils.data import DataLoader, TensorDataset

from qaware import PostTrainingQuantization, QuantizationAwareTraining
from qaware.engines.learned import grids
from qaware.lm import CausalLM, TextDataModule

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def rank() -> int:
    """As Lightning numbers it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def devices(processes: int) -> dict[str, Any]:
    return {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}


def scores(processes: int, folder: Path) -> dict[str, float]:
    """QAT of the library's own model on its own data, scored."""
    pl.seed_everything(0, verbose=False)
    source = folder / "text.txt"
    if rank() == 0:
        source.write_text("".join(f"{i} and {i * i % 97} make {i % 13}.\n" for i in range(900)))
    data = TextDataModule(
        str(source),
        tokenizer=300,
        block_size=32,
        max_val_windows=21,
        batch_size=8 // processes,
        cache_dir=str(folder / "cache"),
    )
    qat = QuantizationAwareTraining("int8-dynamic-int4-weight", output_dir=folder / f"out{processes}")
    run = trainer(max_steps=4, callbacks=[qat], **devices(processes))
    run.fit(CausalLM(LLAMA), datamodule=data)
    assert qat.result is not None
    return {stage: qat.result.scores[stage].nats for stage in ("prepared", "converted")}


def ranges(processes: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Of observers that do not depend on the order, by both doors."""
    runs = [*itertools.product(("minmax", "histogram"), ("fit", "validate")), ("mse", "fit")]
    return {f"{observer} {door}": _ranges(observer, door, processes, folder) for observer, door in runs}


def _ranges(observer: str, door: str, processes: int, folder: Path) -> dict[str, list[float]]:
    """Scale and zero point of every layer, after a fit without any step or after a validation."""
    pl.seed_everything(0, verbose=False)
    inputs, labels = images().dataset.tensors
    # 7 batches make uneven shares, and shuffling makes another order than that of the data.
    data = DataLoader(TensorDataset(inputs**3, labels), batch_size=8, shuffle=True)
    scheme = {"bits": 8, "activation": "int8-static", "observer": observer}
    ptq = PostTrainingQuantization(
        {"rules": [{"type": "Linear", "scheme": scheme}]},
        target="net",
        score=False,
        calibration_batches=7,
        output_dir=folder / f"{observer}-{door}-{processes}",
    )
    run = trainer(callbacks=[ptq], max_steps=0, **devices(processes))
    if door == "fit":
        run.fit(LitClassifier(), data, images(1))
    else:
        run.validate(LitClassifier(), data, verbose=False)
    assert ptq.result is not None
    return {name: [a.scale, a.zero_point] for name, a in ptq.result.model.activations.items()}


def distilled(processes: int, folder: Path) -> dict[str, Any]:
    """Weights of the student after a step, and of the teacher."""
    torch.manual_seed(rank())  # DDP gives every rank the weights of the first
    model = Sgd()
    recipe = {"rules": [{"name": "*", "scheme": {"bits": 2}}]}
    qat = QuantizationAwareTraining(recipe, distillation=0.5, score=False, convert=False)
    run = trainer(max_steps=1, callbacks=[qat], use_distributed_sampler=False, **devices(processes))
    share = range(rank(), 32, processes)
    run.fit(model, DataLoader(Counting(0), batch_size=8 // processes, sampler=share))
    return {"student": model.state_dict(), "teacher": qat.state_dict()["teacher"]}


def learned(processes: int, folder: Path) -> list[list[list[float]]]:
    """What is learned of the scales of each layer."""
    pl.seed_everything(0, verbose=False)
    model = LitLM()
    rules = [{"type": "Linear", "scheme": {"bits": 3, "group_size": 32, "symmetric": False}}]
    qat = QuantizationAwareTraining({"rules": rules, "learning": "range"}, start_step=2, convert=False)
    trainer(max_steps=4, callbacks=[qat], **devices(processes)).fit(model, loader(), loader(9))
    return [[p.flatten().tolist() for p in grid.parameters()] for grid in grids(model)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = {job.__name__: job(2, out) for job in (scores, ranges, distilled, learned)}
    torch.save(found, out / f"rank{rank()}.pt")
