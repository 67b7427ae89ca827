from __future__ import annotations

import re

import pytest
import torch

from qaware.errors import QawareError
from qaware.metrics.windows import Windows, data_hash

torch.set_num_threads(1)


def windows(ids=((1, 2, 3), (4, 5)), first=(1, 1), **changes) -> Windows:
    fields = {"bytes": None, "tokenizer": "t", "window": 3, "stride": 3, "bos": False} | changes
    return Windows(ids=tuple(torch.tensor(row) for row in ids), first=first, **fields)


def test_tokens_are_those_from_first_on():
    assert windows().tokens == 3
    assert windows(first=(2, 1)).tokens == 2


def test_protocol_is_plain_and_complete():
    protocol = windows().protocol()
    assert protocol == {
        "data": protocol["data"],
        "tokenizer": "t",
        "window": 3,
        "stride": 3,
        "bos": False,
        "normalizer": "token",
        "tokens": 3,
    }
    assert re.fullmatch(r"[0-9a-f]{64}", protocol["data"])
    assert re.fullmatch(r"[0-9a-f]{16}", windows().fingerprint)


def test_fingerprint_is_stable_across_processes_and_versions():
    assert windows().fingerprint == "eea40b68a2f89e9d"


@pytest.mark.parametrize(
    "other",
    [
        windows(ids=((1, 2, 3), (4, 6))),
        windows(ids=((1, 2), (3, 4, 5))),  # the same tokens, cut elsewhere
        windows(first=(2, 1)),
        windows(tokenizer="u"),
        windows(window=4),
        windows(stride=2),
        windows(bos=True),
    ],
)
def test_whatever_changes_the_count_changes_the_fingerprint(other):
    assert other.fingerprint != windows().fingerprint


def test_bytes_do_not_change_what_nats_mean():
    assert windows(bytes=9).fingerprint == windows().fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": (), "first": ()}, "none to score"),
        ({"first": (1,)}, "1 entries for 2 windows"),
        ({"first": (0, 1)}, "window 0: first = 0"),
        ({"first": (1, 2)}, "window 1: first = 2 scores nothing of 2 tokens"),
        ({"ids": ((1.0, 2.0), (1, 2))}, r"window 0: \(2,\) float32"),
        ({"ids": (((1, 2),), (1, 2))}, r"window 0: \(1, 2\) int64"),
        ({"stride": 0}, "stride: 0"),
        ({"window": 0}, "window: 0"),
        ({"bytes": 0}, "bytes: 0"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(QawareError, match=message):
        windows(**changes)


def test_from_batches_makes_a_window_of_each_row_and_copies():
    batch = torch.arange(6).reshape(2, 3)
    made = Windows.from_batches([batch, torch.tensor([[7, 8]])], tokenizer="abc")
    batch.zero_()
    assert [ids.tolist() for ids in made.ids] == [[0, 1, 2], [3, 4, 5], [7, 8]]
    assert (made.first, made.tokens, made.bytes) == ((1, 1, 1), 5, None)
    assert (made.window, made.stride, made.tokenizer, made.bos) == (3, 3, "abc", False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "none to score"),
        ([torch.tensor([1, 2])], r"batch 0: \(2,\) int64"),
        ([{"input_ids": 1}], "batch 0: dict"),
        ([torch.ones(1, 4)], "float32 must be a 1-D int64"),
        ([torch.ones(1, 1, dtype=torch.int64)], "single token"),
    ],
)
def test_from_batches_refuses(batches, message):
    with pytest.raises(QawareError, match=message):
        Windows.from_batches(batches)


def test_data_hash_covers_dtype_shape_and_layout():
    x = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    different = [x, x.float(), x.reshape(3, 2), torch.zeros(0), torch.tensor(1.0)]
    assert len({data_hash([item]) for item in different}) == len(different)
    assert data_hash([x.t().contiguous().t()]) == data_hash([x])  # strides are not data


def test_the_first_windows() -> None:
    rows = torch.arange(12).view(3, 4)
    some = Windows.from_batches([rows]).head(2)
    assert [ids.tolist() for ids in some.ids] == rows[:2].tolist()
    assert (some.tokens, some.bytes) == (6, None)
    assert some.fingerprint != Windows.from_batches([rows]).fingerprint
