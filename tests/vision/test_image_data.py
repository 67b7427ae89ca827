"""The data module: what its loaders give, which images they are, and options that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qaware.errors import QawareError
from qaware.vision import ImageDataModule

from .conftest import COUNT, encoded, pixels


def test_batches(image_folder: Callable[..., Path]) -> None:
    data = ImageDataModule(str(image_folder()), batch_size=4, val_fraction=0.25)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((4, 3, 6, 6), torch.float32)
    assert (labels.shape, labels.dtype) == ((4,), torch.int64)
    assert (data.channels, data.classes) == (3, 3)
    everything = torch.cat([images for images, _ in data.train_dataloader()])
    assert everything.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert everything.std(dim=(0, 2, 3)).sub(1).abs().max() < 1e-2


def test_validation_is_fixed_and_not_trained_on(jpeg_npz: Path) -> None:
    def images(data: ImageDataModule, name: str) -> set[bytes]:
        return {image.numpy().tobytes() for batch, _ in getattr(data, name)() for image in batch}

    one, other = (ImageDataModule(str(jpeg_npz), seed=s, mean=[0], std=[1]) for s in (0, 1))
    assert images(one, "val_dataloader") == images(other, "val_dataloader")
    assert not images(one, "val_dataloader") & images(one, "train_dataloader")
    assert images(one, "test_dataloader") == images(one, "val_dataloader")


def test_calibration_takes_training_images_as_they_are(jpeg_npz: Path) -> None:
    data = ImageDataModule(str(jpeg_npz), crop_padding=2, flip=True, batch_size=64)
    plain = ImageDataModule(str(jpeg_npz), batch_size=64)
    calibrated, labels = next(iter(data.calibration_dataloader()))
    expected, expected_labels = next(iter(plain.train_dataloader()))
    assert torch.equal(calibrated, expected)
    assert torch.equal(labels, expected_labels)
    augmented, same_labels = next(iter(data.train_dataloader()))
    assert torch.equal(labels, same_labels)
    assert not torch.equal(calibrated, augmented)
    assert labels[:COUNT].unique().numel() > 1, "the file is sorted by class, the batches are not"


def test_given_statistics(jpeg_npz: Path) -> None:
    data = ImageDataModule(str(jpeg_npz), mean=[0.5], std=[0.25])
    assert data.preprocessing() == {
        "mean": [0.5],
        "std": [0.25],
        "channels": 1,
        "size": [6, 6],
        "classes": 3,
    }
    batch, _ = next(iter(data.val_dataloader()))
    raw, _ = next(iter(ImageDataModule(str(jpeg_npz), mean=[0], std=[1]).val_dataloader()))
    assert torch.allclose(batch, (raw - 0.5) / 0.25, atol=1e-5)


def test_size_and_channels(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    (folder / "dark" / "wide.png").write_bytes(encoded(pixels(0, 9, size=(6, 9))))
    with pytest.raises(QawareError, match=r"size: image 0 of source has 6x6 pixels and image .* 6x9; give"):
        ImageDataModule(str(folder)).setup()
    data = ImageDataModule(str(folder), size=(4, 5), channels=1)
    assert next(iter(data.train_dataloader()))[0].shape[1:] == (1, 4, 5)


def test_validation_images_of_another_size(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    x = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "val.npz", x_train=x, y_train=np.arange(6) % 3)
    with pytest.raises(QawareError, match="training images have 6x6 pixels and validation images 8x8"):
        ImageDataModule(str(image_folder()), val_source=str(tmp_path / "val.npz")).setup()


def test_labels_outside_the_classes(tmp_path: Path, jpeg_npz: Path) -> None:
    with pytest.raises(QawareError, match="classes: source has label 2, and 2 classes are 0 to 1"):
        ImageDataModule(str(jpeg_npz), classes=2).setup()
    x, y = np.zeros((4, 6, 6), dtype=np.uint8), np.array([0, 1, 5, 0])
    np.savez(tmp_path / "val.npz", x_train=x, y_train=y)
    with pytest.raises(QawareError, match="classes: val_source has label 5, and 3 classes are 0 to 2"):
        ImageDataModule(str(jpeg_npz), val_source=str(tmp_path / "val.npz")).setup()
    np.savez(tmp_path / "unlabelled.npz", x_train=x, y_train=y - 1)
    with pytest.raises(QawareError, match="source has label -1"):
        ImageDataModule(str(tmp_path / "unlabelled.npz"), val_fraction=0.5).setup()


def test_constant_images_have_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.zeros((8, 6, 6), dtype=np.uint8), y_train=np.arange(8) % 2)
    data = ImageDataModule(str(tmp_path / "a.npz"), val_fraction=0.5)
    with pytest.raises(QawareError, match=r"std: .* must be 1 numbers, one a channel, above 0; give std"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction: 1.0 must be between 0 and 1"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"crop_padding": -1}, "crop_padding: -1"),
        ({"channels": 2}, "channels: 2 must be 1, 3 or null"),
        ({"classes": 1}, "classes: 1"),
        ({"max_images": 1}, "max_images: 1"),
        ({"size": (0, 4)}, "size"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QawareError, match=message):
        ImageDataModule("sklearn-digits", **options)


def test_statistics_of_another_number_of_channels(jpeg_npz: Path) -> None:
    with pytest.raises(QawareError, match=r"mean: \[0.5, 0.5, 0.5\] must be 1 numbers"):
        ImageDataModule(str(jpeg_npz), mean=[0.5] * 3).val_dataloader()
