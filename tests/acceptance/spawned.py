"""Train with a strategy that starts its own processes; prints what the main process holds after."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import qaware

from .data import sequences
from .models import LitLM
from .runs import INT4, fake_quantized, make, qat, trainer, validate


def main(strategy: str, folder: Path) -> None:
    data = sequences(batch_size=4), sequences(9)
    options = {"strategy": strategy, "devices": 2, "max_epochs": 1}
    try:
        trainer(qat(INT4), **options).fit(make(), *data)
        refused = None
    except Exception as error:
        refused = str(error)
    model = qaware.prepare(make(), INT4)
    before = model.body.up.weight.detach().clone()
    trainer(qat(INT4, score=True, output_dir=folder / strategy), **options).fit(model, *data)
    converted = model_of(qaware.convert(model).module)
    found = {
        "refused": refused,
        "prepared": sorted(fake_quantized(model)),
        "trained": not torch.equal(before, model.body.up.weight),
        "fake_quant": validate(model),
        "converted": validate(converted),
        "float": validate(make()),
    }
    print(json.dumps(found))


def model_of(module: torch.nn.Module) -> LitLM:
    assert isinstance(module, LitLM)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
