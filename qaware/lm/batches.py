"""Windows cut out of a stream of tokens, and the batches in which they are trained on and scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from qaware.lm.cache import Array, Stream

LAYOUTS = ("packed", "documents")
IGNORED = -100
"""Labels with this value, which is torch's own, are not trained on or scored."""
Batch = dict[str, Tensor]


def cut(stream: Stream, block_size: int, layout: str) -> Array:
    """Where each window starts and stops in the stream, (windows, 2)."""
    if layout == "packed":
        starts = np.arange(0, len(stream.ids), block_size)
        ends = np.full_like(starts, len(stream.ids))
    else:
        starts, ends = np.r_[0, stream.ends[:-1]], stream.ends
    spans = np.stack([starts, np.minimum(ends, starts + block_size)], axis=1)
    return spans[lengths(spans) >= 2]  # a single token has nothing to be predicted


def lengths(spans: Array) -> Array:
    """Tokens of each window."""
    return spans[:, 1] - spans[:, 0]


class Part(Dataset[Tensor]):
    """Training or validation windows, each a 1-D int64 tensor."""

    def __init__(self, stream: Stream, spans: Array) -> None:
        self.stream, self.spans = stream, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Tensor:
        start, stop = self.spans[index]
        return torch.from_numpy(self.stream.ids[start:stop].astype(np.int64))

    @property
    def scored_bytes(self) -> int:
        """The utf-8 bytes of every token after the first of its window."""
        return sum(int(self.stream.bytes[start + 1 : stop].sum()) for start, stop in self.spans)


class Batches(Dataset[Batch]):
    """Batches of windows of equal length, in the order of their lengths; nothing is padded."""

    def __init__(self, part: Part, batch_size: int) -> None:
        self.part, self.groups = part, []
        tokens = lengths(part.spans)
        for length in np.unique(tokens):
            same = np.flatnonzero(tokens == length)
            self.groups += [same[i : i + batch_size] for i in range(0, len(same), batch_size)]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Batch:
        return stack([self.part[i] for i in self.groups[index]])


def stack(windows: Sequence[Tensor]) -> Batch:
    """A batch of windows of one length."""
    return {"input_ids": torch.stack(list(windows))}


def pad(windows: Sequence[Tensor], filling: int) -> Batch:
    """A batch of windows of any length, with labels that leave out the filling."""
    rows = list(windows)
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=filling),
        "labels": pad_sequence(rows, batch_first=True, padding_value=IGNORED),
    }
