"""What one rank of ``test_awq.test_two_processes_find_the_same_scales`` runs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from decoders import Decoder
from torch import Tensor

import qaware


def batches() -> list[Tensor]:
    """Five, so that the ranks have uneven shares."""
    return [torch.randint(0, 16, (2 + i, 6), generator=torch.Generator().manual_seed(i)) for i in range(5)]


def integers() -> dict[str, list[Tensor]]:
    """Of every layer, with both kinds of scales folded."""
    torch.manual_seed(0)
    model = Decoder().eval()
    scheme = {"bits": 4, "group_size": 4, "activation": "int8-dynamic"}
    recipe = {"rounding": ["smoothquant", "awq", "mse"], "rules": [{"type": "Linear", "scheme": scheme}]}
    found = qaware.quantize(model, recipe, calibration=batches(), calibration_batches=5)
    return {name: [weight.data, weight.scale] for name, weight in found.weights.items()}


def run(rank: int, folder: str) -> None:
    """One of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(integers(), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
