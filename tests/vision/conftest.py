"""Small images of three classes, each with a brightness of its own, in every kind of source."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("dark", "grey", "light")
COUNT = 8
"""Images of each class."""


def pixels(label: int, index: int, size: tuple[int, int] = (6, 6)) -> np.ndarray[Any, Any]:
    """uint8 (H, W, 3) around 40, 120 or 200."""
    noise = np.random.default_rng([label, index]).integers(0, 30, size=(*size, 3))
    return (40 + 80 * label + noise).astype(np.uint8)


def encoded(image: np.ndarray[Any, Any], form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a folder of PNGs for each class, below each of ``splits``."""

    def make(name: str = "images", splits: tuple[str, ...] = ("",), names: tuple[str, ...] = NAMES) -> Path:
        for split in splits:
            for label, kind in enumerate(names):
                folder = tmp_path / name / split / kind
                folder.mkdir(parents=True)
                for i in range(COUNT):
                    (folder / f"{i}.png").write_bytes(encoded(pixels(label, i)))
        return tmp_path / name

    return make


@pytest.fixture
def jpeg_npz(tmp_path: Path) -> Path:
    """JPEG bytes of grey images, joined, sorted by class."""
    parts = [encoded(pixels(y, i)[..., 0], "JPEG") for y in range(3) for i in range(COUNT)]
    path = tmp_path / "jpeg.npz"
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(parts), dtype=np.uint8),
        offset=np.cumsum([0, *map(len, parts)]),
        label=np.repeat(np.arange(3, dtype=np.uint8), COUNT),
    )
    return path
