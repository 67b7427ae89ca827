"""What one rank of ``test_ptq.test_ranges_are_identical_for_one_and_two_processes`` runs."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lit import LitClassifier, images, trainer
from torch.utils.data import DataLoader, TensorDataset

from qaware import PostTrainingQuantization

Ranges = dict[str, list[float]]


def ranges(observer: str, step: str, processes: int, folder: Path) -> Ranges:
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
        output_dir=folder / f"{observer}-{step}-{processes}",
    )
    strategy = "ddp" if processes > 1 else "auto"
    run = trainer(callbacks=[ptq], devices=processes, strategy=strategy, max_steps=0)
    if step == "fit":
        run.fit(LitClassifier(), data, images(1))
    else:
        run.validate(LitClassifier(), data, verbose=False)
    assert ptq.result is not None
    return {name: [a.scale, a.zero_point] for name, a in ptq.result.model.activations.items()}


def job(processes: int, folder: Path) -> dict[str, Ranges]:
    """For observers that do not depend on the order, by both doors."""
    runs = [*itertools.product(("minmax", "histogram"), ("fit", "validate")), ("mse", "fit")]
    return {f"{observer} {step}": ranges(observer, step, processes, folder) for observer, step in runs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = job(2, out)
    (out / f"rank{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(found))
