"""Train with strategies that start their own processes; prints what the main process holds after each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import qaware

from .data import sequences
from .models import LitLM
from .runs import INT4, fake_quantized, make, qat, trainer, validate

STRATEGIES = ("ddp_fork", "ddp_notebook", "ddp_spawn")


def train(strategy: str, folder: Path) -> dict[str, Any]:
    data = sequences(batch_size=4), sequences(9)
    options = {"strategy": strategy, "devices": 2, "max_epochs": 1}
    model = qaware.prepare(make(), INT4)
    before = model.body.up.weight.detach().clone()
    trainer(qat(INT4, score=True, output_dir=folder / strategy), **options).fit(model, *data)
    converted = model_of(qaware.convert(model).module)
    return {
        "prepared": sorted(fake_quantized(model)),
        "trained": not torch.equal(before, model.body.up.weight),
        "fake_quant": validate(model),
        "converted": validate(converted),
        "float": validate(make()),
    }


def refused(strategy: str) -> str | None:
    """What the processes say of a model that is not prepared."""
    try:
        trainer(qat(INT4), strategy=strategy, devices=2, max_epochs=1).fit(make(), sequences())
    except Exception as error:
        return str(error)
    return None


def model_of(module: torch.nn.Module) -> LitLM:
    assert isinstance(module, LitLM)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = {strategy: train(strategy, Path(sys.argv[1])) for strategy in STRATEGIES}
    print(json.dumps({"refused": refused(STRATEGIES[0]), "trained": trained}))
