"""Images out of what `datasets` loads: the hub, folders with a folder a class, parquet files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qaware.errors import QawareError
from qaware.lm.loading import hub_answers, one_line, only_cached_datasets, quiet_datasets
from qaware.vision.images import Array, Images, decode, from_pil

_LABELS = ("label", "labels", "target", "class", "fine_label")
"""Columns that are taken for the classes where several could be."""
_FILES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
"""Files of a folder that make it a dataset, rather than a folder of images."""
_SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` leaves in a folder."""
Columns = tuple[str | None, str | None]
"""Names of the image and label columns; None to find them."""


def read_local(path: Path, config: str | None, columns: Columns, key: str) -> dict[str, Images]:
    """The parts of a folder or a parquet file, by the names of their splits.

    Raises:
        QawareError: there are no images in it, or it cannot be loaded.
    """
    # A folder of our own: the cache of `datasets` would keep a second copy, and tells files apart by time.
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with quiet_datasets():
                splits = _load_local(path, config, scratch)
        except Exception as error:  # datasets wraps whatever its parsers raise
            raise QawareError(
                f"{key}: no images could be loaded from {path} ({one_line(error.__cause__ or error)}); "
                "give a folder with a folder of images for each class, or a parquet file"
            ) from error
        return {name: _read(rows, columns, key) for name, rows in splits.items()}


def read_hub(name: str, config: str | None, columns: Columns, splits: list[str], key: str) -> dict[str, Any]:
    """The parts of a dataset on the hub, those in ``splits`` that it has.

    Raises:
        QawareError: there is no such dataset, or no connection.
    """
    import datasets

    try:
        with only_cached_datasets(not hub_answers()):
            loaded = datasets.load_dataset(name, config)
    except Exception as error:  # network, name and config each raise their own
        raise QawareError(
            f"{key}: {name!r} (config {config!r}) is no local file or folder and could not be read from the "
            f"hub ({one_line(error)}); check the name and the connection, or give a local source"
        ) from error
    return {split: _read(loaded[split], columns, key) for split in splits if split in loaded}


def _load_local(path: Path, config: str | None, scratch: str) -> Mapping[str, Any]:
    import datasets

    options: dict[str, Any] = {"cache_dir": scratch}
    if path.is_file():
        return dict(datasets.load_dataset("parquet", data_files={"train": str(path)}, **options))
    if any((path / name).is_file() for name in _SAVED):
        saved = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, dict) else {"train": saved}
    if any(file.suffix in _FILES for file in path.rglob("*")):
        return dict(datasets.load_dataset(str(path), config, **options))
    folder = datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=False, **options)
    return dict(folder)


def _read(rows: Any, columns: Columns, key: str) -> Images:
    import datasets

    image = _image_column(rows, columns[0], key)
    label = _label_column(rows, columns[1], key)
    undecoded = rows.cast_column(image, datasets.Image(decode=False))
    pixels = [_pixels(value, f"{key}: image {i}") for i, value in enumerate(undecoded[image])]
    labels, names = _classes(rows, label, key)
    return Images(pixels, labels, names)


def _pixels(value: Any, where: str) -> Array:
    if not isinstance(value, Mapping):  # where a column's images are not encoded
        return from_pil(value, where)
    data = value.get("bytes")
    if data is None and value.get("path"):
        where, data = f"{where} ({Path(value['path']).name})", Path(value["path"]).read_bytes()
    if data is None:
        raise QawareError(f"{where}: is missing; remove the row")
    return decode(data, where)


def _image_column(rows: Any, wanted: str | None, key: str) -> str:
    import datasets

    found = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    # Parquet that `datasets` did not write keeps encoded images as plain bytes, alone or in a structure.
    found += [name for name, kind in rows.features.items() if _holds_bytes(kind)]
    if wanted is not None and wanted in rows.column_names:
        return wanted
    if wanted is not None or len(found) != 1:
        raise QawareError(
            f"image_field: {wanted!r} does not name the images of {key}, which has columns "
            f"{', '.join(rows.column_names)}; name one"
        )
    return str(found[0])


def _holds_bytes(kind: Any) -> bool:
    if isinstance(kind, dict):
        return "bytes" in kind
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _label_column(rows: Any, wanted: str | None, key: str) -> str:
    import datasets

    found = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    found = found if len(found) == 1 else [name for name in _LABELS if name in rows.column_names][:1]
    if wanted is not None:
        found = [wanted] if wanted in rows.column_names else []
    if not found:
        raise QawareError(
            f"label_field: {wanted!r} does not name the classes of {key}, which has columns "
            f"{', '.join(rows.column_names)}; name one"
        )
    return str(found[0])


def _classes(rows: Any, label: str, key: str) -> tuple[Array, tuple[str, ...] | None]:
    """Integers as they are; text numbered in the order of the alphabet."""
    values = np.asarray(rows[label])
    names = getattr(rows.features[label], "names", None)
    if values.dtype.kind in "US":
        known, values = np.unique(values, return_inverse=True)
        names = [str(name) for name in known]
    if values.dtype.kind not in "iu":
        raise QawareError(f"label_field: {label!r} of {key} is {values.dtype}, neither integers nor text")
    return values.astype(np.int64), tuple(names) if names else None
