"""Normalization, augmentation that a resume repeats, and the statistics of the training images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qaware.resumable import Shuffled
from qaware.vision.batches import Augmented, ImageLoader, Normalized, statistics

PIXELS = np.random.default_rng(0).integers(0, 256, size=(20, 3, 5, 6)).astype(np.uint8)


def plain() -> Normalized:
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    return Normalized(PIXELS, np.arange(20) % 4, mean, std)


def test_normalized() -> None:
    images, label = plain()[7]
    expected = (torch.from_numpy(PIXELS[7]) / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / (
        torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    )
    assert images.dtype == torch.float32
    assert torch.allclose(images, expected, atol=1e-5)
    assert label == 3


def test_statistics_are_those_of_all_pixels() -> None:
    mean, std = statistics(PIXELS)
    assert mean == pytest.approx((PIXELS / 255).mean(axis=(0, 2, 3)))
    assert std == pytest.approx((PIXELS / 255).std(axis=(0, 2, 3)))


def test_a_flip_mirrors_half() -> None:
    images = Augmented(plain(), 0, True, seed=0)
    mirrored = [torch.equal(images[i][0], plain()[i][0].flip(-1)) for i in range(20)]
    same = [torch.equal(images[i][0], plain()[i][0]) for i in range(20)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 4 < sum(mirrored) < 16


def test_a_crop_is_a_piece_of_the_bordered_image() -> None:
    images = Augmented(plain(), 2, False, seed=0)
    bordered = torch.nn.functional.pad(torch.from_numpy(PIXELS[3]), (2, 2, 2, 2))
    pieces = [
        images.normalize(bordered[:, top : top + 5, left : left + 6]) for top in range(5) for left in range(5)
    ]
    found = set()
    for images.epoch in range(8):
        found |= {i for i, piece in enumerate(pieces) if torch.equal(piece, images[3][0])}
    assert len(found) > 3


def test_draws_depend_on_seed_epoch_and_index_only() -> None:
    first, again, other = (Augmented(plain(), 2, True, seed) for seed in (0, 0, 1))
    torch.manual_seed(5)
    a = torch.stack([first[i][0] for i in range(20)])
    assert torch.equal(a, torch.stack([again[i][0] for i in reversed(range(20))]).flip(0))
    assert not torch.equal(a, torch.stack([other[i][0] for i in range(20)]))
    again.epoch = 1
    assert not torch.equal(a, torch.stack([again[i][0] for i in range(20)]))


def loader(workers: int = 0) -> ImageLoader:
    images = Augmented(plain(), 2, True, seed=0)
    return ImageLoader(images, batch_size=6, sampler=Shuffled(images, 0), num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_draws_anew_and_a_resumed_one_the_same(workers: int) -> None:
    one = loader(workers)
    epochs = []
    for epoch in range(2):
        one.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append([images for images, _ in one])
    expected = Augmented(plain(), 2, True, seed=0)
    expected.epoch = 1
    drawn = torch.stack([expected[i][0] for i in one.sampler])
    assert torch.equal(torch.cat(epochs[1]), drawn)
    resumed = loader()
    resumed.load_state_dict({"epoch": 1, "batches": 2})
    resumed.sampler.set_epoch(1)  # type: ignore[attr-defined]
    left = [images for images, _ in resumed]
    assert len(left) == 2
    assert all(torch.equal(a, b) for a, b in zip(left, epochs[1][2:], strict=True))
