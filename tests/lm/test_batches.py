"""Windows and batches of a stream whose tokens are 0, 1, 2, ..."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qaware.lm import batches
from qaware.lm.cache import Stream
from qaware.resumable import Shuffled

STREAM = Stream(np.arange(12, dtype=np.int32), np.arange(100, 112, dtype=np.int32), np.array([5, 6, 12]))


def part(layout: str, block_size: int = 4) -> batches.Part:
    return batches.Part(STREAM, batches.cut(STREAM, block_size, layout))


@pytest.mark.parametrize(
    ("layout", "block_size", "windows"),
    [
        ("packed", 5, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]),
        ("packed", 11, [list(range(11))]),  # the one token that is left over predicts nothing
        ("packed", 100, [list(range(12))]),
        ("documents", 4, [[0, 1, 2, 3], [6, 7, 8, 9]]),
        ("documents", 100, [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10, 11]]),
    ],
)
def test_windows_are_cut_out_of_the_stream(layout: str, block_size: int, windows: list[Any]) -> None:
    cut = part(layout, block_size)
    assert [cut[i].tolist() for i in range(len(cut))] == windows
    assert {cut[i].dtype for i in range(len(cut))} == {torch.int64}
    assert cut.scored_bytes == sum(100 + token for window in windows for token in window[1:])


def test_batches_hold_windows_of_one_length() -> None:
    found = batches.Batches(part("packed", 5), 2)
    rows = [found[i]["input_ids"].tolist() for i in range(len(found))]
    assert rows == [[[10, 11]], [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]]
    assert len(batches.Batches(part("packed", 5), 1)) == 3


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = Shuffled(part("packed", 2), seed)
        sampler.set_epoch(epoch)
        torch.rand(1)  # drawing elsewhere changes nothing
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 1) == order(0, 1) != order(0, 0)
    assert order(1, 0) != order(0, 0)
    assert sorted(order(0, 1)) == list(range(6))


def test_filling_is_at_the_end_and_not_in_the_labels() -> None:
    batch = batches.pad([torch.tensor([5, 6]), torch.tensor([7, 8, 9])], filling=3)
    assert batch["input_ids"].tolist() == [[5, 6, 3], [7, 8, 9]]
    assert batch["labels"].tolist() == [[5, 6, -100], [7, 8, 9]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
