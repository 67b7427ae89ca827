"""Large int8 and float16 layers: tract must convert them while it loads, not in every call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tract_tools import NOISE, convert, distance, everywhere, make

from qaware.exporters.signature import Signature, TensorSpec


class Large(nn.Module):
    """A linear layer and a table with more numbers than tract folds while it loads, tied, with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(90, 64)
        self.inner = nn.Linear(64, 120)
        self.outer = nn.Linear(120, 64, bias=False)
        self.head = nn.Linear(64, 90, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.outer(self.inner(x).relu()))


@pytest.fixture
def little_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tract folded no more than 2500 numbers, so that small layers count as large."""
    from qaware.exporters import tract_unpack

    monkeypatch.setattr(tract_unpack, "FOLDED", 2500)


@pytest.mark.usefixtures("little_folding")
@pytest.mark.parametrize("scheme", [{"bits": 8, "group_size": 4, "symmetric": False}, {"bits": 16}], ids=str)
@pytest.mark.parametrize("shape", [("n",), ("b", "n")], ids=str)
def test_large_layers_are_cut_into_parts(tmp_path: Path, scheme: dict, shape: tuple[str, ...]) -> None:
    signature = Signature((TensorSpec("ids", "int64", shape, 0, 89),), dict.fromkeys(shape, (1, 30)))
    ids = torch.arange(6).view([6] if len(shape) == 1 else [2, 3])
    made = make(convert(Large(), everywhere(scheme)), tmp_path / "a.nnef.tgz", signature, ids)
    assert distance(made, (ids,), (ids.flatten()[:1].view([1] * len(shape)),)).relative < NOISE
    # inner has 120 rows of 64, outer 64 of 120, head 90 of 64.
    assert made.files["graph.nnef"].decode().count(" linear(") == 4 + 4 + 3


def test_tract_converts_weights_while_it_loads(tmp_path: Path) -> None:
    import tract

    model = nn.Sequential(nn.Embedding(90, 64), nn.Linear(64, 2**15 + 7))
    signature = Signature((TensorSpec("ids", "int64", ("n",), 0, 89),), {"n": (1, 30)})
    made = make(convert(model, everywhere({"bits": 8})), tmp_path / "a.nnef.tgz", signature, torch.arange(3))
    loaded = tract.nnef().with_tract_extra().with_tract_transformers().load(str(made.artifact.path))
    profile = json.loads(loaded.into_runnable().profile_json([np.arange(1)]))
    kinds = [node["op_name"] for node in profile["nodes"]]
    assert kinds.count("OptMatMul") == 3
    assert kinds.count("Cast") == 1, "only the rows that were gathered are converted in a call"
