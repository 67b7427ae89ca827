"""Decoded images with their labels, and how images of many kinds become arrays of one shape."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qaware.errors import QawareError

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L")
_GREY_MODES = ("1", "L", "LA")


@dataclass(frozen=True)
class Images:
    """One part of a source, as it was read."""

    pixels: Sequence[Array] | Array
    """uint8, each (H, W) or (H, W, 3)."""
    labels: Array
    """int64 (N,)."""
    names: tuple[str, ...] | None = None
    """Of the classes, where the source has them."""

    def take(self, indices: Array) -> Images:
        """The images at ``indices``, in that order."""
        return Images([self.pixels[i] for i in indices], self.labels[indices], self.names)

    def relabelled(self, names: tuple[str, ...] | None, key: str) -> Images:
        """With the labels that ``names`` gives to the classes, where both have names.

        Raises:
            QawareError: a class that is not in ``names``.
        """
        if names is None or self.names is None or names == self.names:
            return self
        used = [self.names[i] for i in np.unique(self.labels)]
        if unknown := [name for name in used if name not in names]:
            raise QawareError(
                f"{key}: class {unknown[0]!r} is not in the training data, which has {', '.join(names[:10])}"
            )
        table = np.array([names.index(n) if n in names else -1 for n in self.names], dtype=np.int64)
        return dataclasses.replace(self, labels=table[self.labels], names=names)


def decode(data: bytes, where: str) -> Array:
    """The pixels of an encoded image (JPEG, PNG, ...), uint8 (H, W) or (H, W, 3).

    Raises:
        QawareError: ``where``: not an image, or more than 8 bits a channel.
    """
    from PIL import Image

    try:
        return from_pil(Image.open(io.BytesIO(data)), where)
    except QawareError:
        raise
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError and others
        raise QawareError(f"{where}: is no image that Pillow can read; repair or remove it") from error


def from_pil(image: Image, where: str) -> Array:
    """uint8 (H, W) of a grey image, (H, W, 3) of any other; transparency is dropped."""
    if image.mode in _DEEP_MODES:
        raise QawareError(f"{where}: has {image.mode!r} pixels of more than 8 bits; convert it to 8 bits")
    return np.array(image.convert("L" if image.mode in _GREY_MODES else "RGB"), dtype=np.uint8)


def stack(images: Sequence[Array] | Array, channels: int, size: tuple[int, int] | None, key: str) -> Array:
    """All images as uint8 (N, channels, H, W).

    Args:
        images: uint8, each (H, W) or (H, W, 3).
        channels: 1 or 3; grey is repeated, colour becomes luma (ITU-R 601).
        size: (height, width) to scale to; None for images of one size.
        key: of the source, for messages.

    Raises:
        QawareError: several sizes without ``size``.
    """
    first = images[0].shape[:2]
    if size is None:
        odd = next((i for i, image in enumerate(images) if image.shape[:2] != first), None)
        if odd is not None:
            (h, w), (other_h, other_w) = first, images[odd].shape[:2]
            raise QawareError(
                f"size: image 0 of {key} has {h}x{w} pixels and image {odd} {other_h}x{other_w}; "
                f"give size, e.g. [{h}, {w}]"
            )
    return np.stack([_convert(image, channels, size or first) for image in images])


def _convert(image: Array, channels: int, size: tuple[int, int]) -> Array:
    if image.shape[:2] != size or (channels == 1 and image.ndim == 3):
        image = _through_pil(image, channels, size)
    if image.ndim == 2:
        return np.repeat(image[None], channels, axis=0)
    channels_first: Array = image.transpose(2, 0, 1)
    return channels_first


def _through_pil(image: Array, channels: int, size: tuple[int, int]) -> Array:
    from PIL import Image

    picture = Image.fromarray(image)
    if channels == 1:
        picture = picture.convert("L")
    if image.shape[:2] != size:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture)
