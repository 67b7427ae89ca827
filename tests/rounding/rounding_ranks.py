"""What one rank of ``test_rounding_ddp`` runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rounded import inputs, recipe
from torch import Tensor, nn

import qaware


class Routed(nn.Module):
    """A layer runs for some batches only, so that a rank may never run it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.some, self.last = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y: Tensor = self.last(self.some(x) if len(x) > 200 else x)
        return y


def job() -> dict[str, Tensor]:
    """Integers, and biases, of every layer, for batches that two ranks share unevenly."""
    torch.manual_seed(3)
    model = Routed().eval()
    batches = [inputs(count, 32) for count in (300, 200, 280, 180, 260)]
    made = qaware.quantize(model, recipe(["gptq", "bias-correction"]), calibration=batches)
    biases = {f"{name} bias": made.module.get_submodule(name).bias.data for name in made.weights}
    return {**{name: weight.data for name, weight in made.weights.items()}, **biases}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(job(), folder / f"{rank}.pt")
    dist.destroy_process_group()
