"""Images as tensors: normalized, and for training moved and mirrored, the same way in a resumed run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qaware.resumable import ResumableLoader
from qaware.vision.images import Array

Sample = tuple[Tensor, int]


class Normalized(Dataset[Sample]):
    """Images as float32 (C, H, W), ``(pixel / 255 - mean) / std`` by channel, with their labels."""

    def __init__(self, pixels: Array, labels: Array, mean: Tensor, std: Tensor) -> None:
        """``pixels``: uint8 (N, C, H, W); ``labels``: int64 (N,); ``mean``, ``std``: float32 (C,)."""
        self.pixels, self.labels = torch.from_numpy(pixels), labels
        self.offset, self.factor = mean[:, None, None] * 255, 1 / (std[:, None, None] * 255)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.normalize(self.pixels[index]), int(self.labels[index])

    def normalize(self, pixels: Tensor) -> Tensor:
        """float32 of uint8 (C, H, W)."""
        return (pixels - self.offset) * self.factor


class Augmented(Normalized):
    """The same, each cut out of a black border at a random place, and half of them mirrored."""

    epoch = 0
    """Which draw; set by :class:`ImageLoader`."""

    def __init__(self, plain: Normalized, crop_padding: int, flip: bool, seed: int) -> None:
        """``crop_padding``: pixels of the border on each side; ``seed``: of all draws."""
        self.__dict__.update(vars(plain))
        self.crop_padding, self.flip, self.seed = crop_padding, flip, seed

    def __getitem__(self, index: int) -> Sample:
        # A draw that depends on nothing else is the same whatever the number of workers or a resume.
        rng = np.random.default_rng([self.seed, self.epoch, index])
        pixels, edge = self.pixels[index], self.crop_padding
        if edge:
            height, width = pixels.shape[1:]
            top, left = rng.integers(0, 2 * edge + 1, size=2)
            pixels = torch.nn.functional.pad(pixels, (edge, edge, edge, edge))
            pixels = pixels[:, top : top + height, left : left + width]
        if self.flip and rng.integers(2):
            pixels = pixels.flip(-1)
        return self.normalize(pixels), int(self.labels[index])


class ImageLoader(ResumableLoader):
    """Training images; each epoch draws anew, and a resumed one draws what it drew."""

    def __iter__(self) -> Any:
        """The batches of the sampler's epoch that are left."""
        if isinstance(self.dataset, Augmented):
            self.dataset.epoch = self._epoch
        return super().__iter__()


def statistics(pixels: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each channel, as shares of 255: uint8 (N, C, H, W) to float64 (C,)."""
    # Through a histogram, because a float64 copy of all pixels would be eight times their size.
    counts = np.stack([np.bincount(pixels[:, c].ravel(), minlength=256) for c in range(pixels.shape[1])])
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    return mean, np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
