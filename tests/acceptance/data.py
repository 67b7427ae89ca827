"""Small data sets."""

from __future__ import annotations

import torch
from resumable_loader import Resumable
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from .models import CLASSES, PIXELS, VOCAB


class Counting(Dataset[dict[str, Tensor]]):
    """Arithmetic sequences modulo the vocabulary, with a mask; a larger ``scale`` makes larger
    activations."""

    def __init__(self, seed: int, count: int, length: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(0, VOCAB, (count, 1), generator=generator)
        self.ids = (start + 3 * torch.arange(length)) % VOCAB
        self.mask = torch.full((length,), scale)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ids": self.ids[index], "mask": self.mask}


def sequences(seed: int = 0, count: int = 48, batch_size: int = 8, scale: float = 1.0) -> Resumable:
    """6 batches of 8 sequences of 8 tokens unless told otherwise."""
    return Resumable(Counting(seed, count, 8, scale), batch_size=batch_size)


def images(seed: int = 0, scale: float = 1.0) -> Resumable:
    """6 batches of 16 labelled vectors that are easy to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (96,), generator=generator)
    inputs = torch.randn(96, PIXELS, generator=generator) * 0.3
    inputs[torch.arange(96), labels] += 2
    return Resumable(TensorDataset(inputs * scale, labels), batch_size=16)
