"""Images out of ``.npz`` files, and the digits of scikit-learn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qaware.errors import QawareError
from qaware.vision.images import Array, Images, decode

TRAIN, TEST = "train", "test"
_LAYOUTS = "x_train and y_train (and x_test, y_test), or jpeg, offset and label"
_GREYS = 16
"""The darkest value of scikit-learn's digits."""


def read_npz(path: Path, key: str) -> dict[str, Images]:
    """The parts of a ``.npz`` file.

    Either arrays ``x_train``, uint8 (N, H, W) or (N, H, W, 1 or 3), and ``y_train``, integers (N,), and the
    same for ``test``; or encoded images: ``jpeg``, uint8, the bytes of all of them joined; ``offset``,
    integers (N + 1,), where each begins and the last one ends; and ``label``, integers (N,).

    Raises:
        QawareError: not such a file, or arrays of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # BadZipFile, ValueError for pickled objects, EOFError, OSError
        raise QawareError(
            f"{key}: {path} cannot be read as .npz without pickles ({error or 'it is damaged'})"
        ) from error
    if {"jpeg", "offset", "label"} <= arrays.keys():
        return {TRAIN: _encoded(arrays, path, key)}
    if {"x_train", "y_train"} <= arrays.keys():
        parts = [p for p in (TRAIN, TEST) if f"x_{p}" in arrays and f"y_{p}" in arrays]
        return {part: _plain(arrays[f"x_{part}"], arrays[f"y_{part}"], f"{key}: x_{part}") for part in parts}
    raise QawareError(f"{key}: {path} has {', '.join(arrays) or 'no arrays'}; it needs {_LAYOUTS}")


def read_digits(key: str) -> dict[str, Images]:
    """The 1,797 digits of 8x8 pixels that come with scikit-learn, as uint8 (0 to 255).

    Raises:
        QawareError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise QawareError(
            f"{key}: 'sklearn-digits' needs scikit-learn; pip install 'qaware[vision]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    grey = np.rint(pixels.reshape(-1, 8, 8) * (255 / _GREYS)).astype(np.uint8)
    return {TRAIN: Images(grey, labels.astype(np.int64), tuple("0123456789"))}


def _encoded(arrays: Mapping[str, Array], path: Path, key: str) -> Images:
    data, offset, label = (arrays[name] for name in ("jpeg", "offset", "label"))
    if len(offset) != len(label) + 1 or offset[-1] != len(data):
        raise QawareError(
            f"{key}: {path} has {len(label)} labels, {len(offset)} offsets and {len(data)} bytes; offset "
            "needs one entry more than label, and ends at the number of bytes"
        )
    spans = itertools.pairwise(offset)
    pixels = [decode(data[a:b].tobytes(), f"{key}: image {i} of {path}") for i, (a, b) in enumerate(spans)]
    return Images(pixels, _labels(label, len(pixels), f"{key}: label"))


def _plain(pixels: Array, labels: Array, where: str) -> Images:
    grey = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] == 1)
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 4 and pixels.shape[3] == 3)):
        raise QawareError(
            f"{where}: is {pixels.shape} {pixels.dtype}; it must be uint8 (N, H, W) or (N, H, W, 1 or 3)"
        )
    if grey and pixels.ndim == 4:
        pixels = pixels[..., 0]
    return Images(pixels, _labels(labels, len(pixels), where))


def _labels(labels: Array, count: int, where: str) -> Array:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise QawareError(
            f"{where}: {count} images have labels {labels.shape} {labels.dtype}; "
            "they must be integers, one for each image"
        )
    return labels.astype(np.int64)
