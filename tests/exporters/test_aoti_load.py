"""The key-value cache that a compiled model is given; loading itself is in test_aoti.py."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from qaware.exporters.aoti_compile import CACHE
from qaware.exporters.aoti_load import Steps, runner
from qaware.exporters.generation import CachedRunner, CacheSpec
from qaware.exporters.signature import Signature, TensorSpec

SPEC = CacheSpec(100, ((2, 4), (2, 8)))
SIGNATURE = Signature((TensorSpec("ids", "int64", (1, "seq"), 0, 9),), {"seq": (1, 80)})


class Native:
    """A model that keeps each id at its place of the cache, and answers with the sum of what is held."""

    def __init__(self, metadata: dict[str, str] | None = None) -> None:
        self.sizes: list[int] = []
        self.metadata = metadata or {}

    def get_metadata(self) -> dict[str, str]:
        return self.metadata

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        ids, positions, *held = inputs
        assert all(t.is_contiguous() for t in inputs)
        assert [t.shape[1::2] for t in held] == [torch.Size(s) for s in SPEC.shapes]
        held[0][0, 0, positions, 0] = ids[0].float()
        self.sizes.append(held[0].shape[2])
        return [held[0][0, 0, : int(positions[-1]) + 1, 0].sum().double()]


def test_what_was_held_is_kept_as_a_text_grows() -> None:
    native = Native()
    step = Steps(native, SPEC)
    assert step(torch.tensor([[1, 2, 3]]), 0) == 6
    assert step(torch.tensor([[4]]), 63) == 10
    assert step(torch.tensor([[5]]), 64) == 15
    assert step(torch.tensor([[6]]), 99) == 21
    assert native.sizes == [64, 64, 100, 100]


def test_a_new_text_needs_less_again() -> None:
    native = Native()
    step = Steps(native, SPEC)
    step(torch.ones(1, 80, dtype=torch.int64), 0)
    assert step(torch.tensor([[7]]), 0) == 7
    assert native.sizes == [100, 64]


def test_outputs_are_float32() -> None:
    assert Steps(Native(), SPEC)(torch.tensor([[1]]), 0).dtype == torch.float32


def test_the_package_says_how_long_its_cache_is() -> None:
    about = {CACHE: json.dumps({"length": 100, "shapes": [[2, 4], [2, 8]]})}
    run: Any = runner(Native(about), SIGNATURE)
    assert isinstance(run, CachedRunner)
    assert (run.length, run.most) == (100, 80)
    assert run.step(torch.tensor([[3]]), 2) == 3
    assert not isinstance(runner(Native(), SIGNATURE), CachedRunner)
