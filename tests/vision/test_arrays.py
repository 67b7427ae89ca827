"""Both layouts of .npz files, the digits, and files of another kind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qaware.errors import QawareError
from qaware.vision.arrays import read_digits, read_npz

from .conftest import COUNT, encoded, pixels


def test_jpeg_bytes(jpeg_npz: Path) -> None:
    images = read_npz(jpeg_npz, "source")["train"]
    assert images.labels.tolist() == np.repeat([0, 1, 2], COUNT).tolist()
    for label, index in ((0, 0), (2, COUNT - 1)):
        difference = images.pixels[label * COUNT + index].astype(int) - pixels(label, index)[..., 0]
        assert np.abs(difference).mean() < 8, "JPEG is lossy, but it is this image"


@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 6, 6, 1), (4, 6, 6, 3)])
def test_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x, y = np.zeros(shape, dtype=np.uint8), np.arange(4, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    parts = read_npz(tmp_path / "a.npz", "source")
    assert [len(part.labels) for part in parts.values()] == [4, 2]
    assert parts["train"].pixels[0].shape == (shape[1:] if shape[-1] == 3 else (6, 6))
    assert parts["test"].labels.dtype == np.int64


GOOD: dict[str, Any] = {"x_train": np.zeros((2, 6, 6), dtype=np.uint8), "y_train": np.arange(2)}
JPEG = np.frombuffer(encoded(pixels(0, 0), "JPEG"), dtype=np.uint8)
ENCODED: dict[str, Any] = {"jpeg": JPEG, "offset": np.array([0, len(JPEG)]), "label": np.array([0])}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(1)}, "has images; it needs x_train and y_train .* or jpeg, offset and label"),
        ({}, "has no arrays"),
        (GOOD | {"x_train": np.zeros((2, 6, 6))}, r"x_train: is \(2, 6, 6\) float64; it must be uint8"),
        (GOOD | {"x_train": np.zeros((2, 3, 6, 6), dtype=np.uint8)}, r"\(2, 3, 6, 6\) uint8; it must be"),
        (GOOD | {"y_train": np.arange(3)}, r"2 images have labels \(3,\) int64"),
        (GOOD | {"y_train": np.array([0.0, 1.0])}, r"have labels \(2,\) float64"),
        (GOOD | {"x_train": np.array([None])}, "without pickles"),
        (ENCODED | {"offset": np.array([0])}, "1 labels, 1 offsets"),
        (ENCODED | {"offset": np.array([0, 5])}, "ends at the number of bytes"),
        (ENCODED | {"jpeg": JPEG[::-1].copy()}, "image 0 of .* is no image"),
    ],
)
def test_refuses(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(QawareError, match=message):
        read_npz(tmp_path / "a.npz", "source")


def test_a_damaged_file(jpeg_npz: Path) -> None:
    jpeg_npz.write_bytes(jpeg_npz.read_bytes()[:200])
    with pytest.raises(QawareError, match=r"source: .*jpeg.npz cannot be read as .npz"):
        read_npz(jpeg_npz, "source")


def test_digits() -> None:
    pytest.importorskip("sklearn")
    images = read_digits("source")["train"]
    assert len(images.labels) == 1797
    assert (images.pixels[0].shape, images.pixels[0].dtype) == ((8, 8), np.uint8)
    assert int(max(image.max() for image in images.pixels)) == 255


def test_digits_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(QawareError, match=r"needs scikit-learn; pip install 'qaware\[vision\]'"):
        read_digits("source")
