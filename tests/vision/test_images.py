"""Any kind of picture as arrays of one shape; labels by name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qaware.errors import QawareError
from qaware.vision.images import Images, decode, from_pil, stack

from .conftest import encoded, pixels


@pytest.mark.parametrize(
    ("mode", "dimensions"), [("1", 2), ("L", 2), ("LA", 2), ("P", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3)]
)
def test_every_mode(mode: str, dimensions: int) -> None:
    array = from_pil(Image.fromarray(pixels(1, 0)).convert(mode), "here")
    assert array.dtype == np.uint8
    assert array.ndim == dimensions


def test_deep_pixels_and_broken_bytes_are_refused() -> None:
    with pytest.raises(QawareError, match="image 3: has 'I;16' pixels of more than 8 bits"):
        decode(encoded(np.full((4, 4), 1000, dtype=np.uint16)), "image 3")
    with pytest.raises(QawareError, match="image 3: is no image that Pillow can read"):
        decode(encoded(pixels(0, 0))[:30], "image 3")


def test_channels() -> None:
    grey, colour = pixels(0, 0)[..., 0], pixels(0, 1)
    assert np.array_equal(stack([colour], 3, None, "s")[0], colour.transpose(2, 0, 1))
    assert np.array_equal(stack([grey], 3, None, "s")[0, 2], grey)
    assert stack([grey, colour], 1, None, "s").shape == (2, 1, 6, 6)
    luma = stack([colour], 1, None, "s")[0, 0]
    assert np.abs(luma - colour @ np.array([0.299, 0.587, 0.114])).max() < 1


def test_sizes() -> None:
    images = [pixels(0, 0), pixels(0, 1, size=(8, 4))]
    with pytest.raises(QawareError, match=r"size: image 0 of s has 6x6 pixels and image 1 8x4; give size"):
        stack(images, 3, None, "s")
    assert stack(images, 3, (5, 7), "s").shape == (2, 3, 5, 7)


def test_labels_follow_names() -> None:
    images = Images([pixels(0, 0)] * 3, np.array([0, 1, 0]), ("b", "a"))
    assert images.relabelled(("a", "b", "c"), "val_source").labels.tolist() == [1, 0, 1]
    assert images.relabelled(None, "val_source") is images
    with pytest.raises(QawareError, match="val_source: class 'b' is not in the training data, which has a"):
        images.relabelled(("a",), "val_source")
    unused = Images([pixels(0, 0)], np.array([1]), ("b", "a"))
    assert unused.relabelled(("a",), "val_source").labels.tolist() == [0]
