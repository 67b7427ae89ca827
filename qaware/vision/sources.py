"""Where images come from, and which of them are trained on and which are scored.

A source is ``"sklearn-digits"``, a ``.npz`` or ``.parquet`` file, a folder, or the name of a dataset on the
hub.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qaware.errors import QawareError
from qaware.vision.arrays import read_digits, read_npz
from qaware.vision.images import Images
from qaware.vision.tables import Columns, read_hub, read_local

DIGITS = "sklearn-digits"
_ENDINGS = (".npz", ".parquet")
_HELD_OUT = ("validation", "valid", "val", "test")
"""Names of the split that a source keeps apart, the likeliest first."""


def read_parts(
    source: str,
    val_source: str | None,
    val_fraction: float,
    *,
    config: str | None,
    columns: Columns,
    splits: tuple[str, str | None],
    limit: int | None = None,
) -> tuple[Images, Images]:
    """Training and validation images.

    The latter are ``val_source``; else the split that is asked for or that the source keeps apart; else
    ``val_fraction`` of each class. At most ``limit`` of both, the first ones of a fixed random order.

    Raises:
        QawareError: a source cannot be read, has no images, or no such split.
    """
    parts = _read(source, config, columns, splits, "source")
    train = _pick(parts, splits[0], "split", source)
    if val_source is not None:
        own = _read(val_source, config, columns, splits, "val_source")
        name = _val_split(own, splits) if len(own) > 1 else next(iter(own))
        val = _pick(own, name or splits[0], "val_split", val_source)
    elif (name := _val_split(parts, splits)) is not None:
        val = _pick(parts, name, "val_split", source)
    else:
        train, val = hold_out(train, val_fraction)
    val = val.relabelled(train.names, "val_source")
    return _at_most(train, limit), _at_most(val, limit)


def hold_out(images: Images, fraction: float) -> tuple[Images, Images]:
    """``fraction`` of each class apart from the rest; the same ones for the same labels, in any run.

    Raises:
        QawareError: nothing, or everything, would be held out.
    """
    order = np.random.default_rng(0).permutation(len(images.labels))
    held = np.zeros(len(order), dtype=bool)
    for label in np.unique(images.labels):
        own = order[images.labels[order] == label]
        held[own[: round(len(own) * fraction)]] = True
    if not held.any() or held.all():
        raise QawareError(
            f"val_fraction: {fraction} of {len(held)} images holds out {held.sum()}; give more images, "
            "another fraction or a val_source"
        )
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))


def _at_most(images: Images, limit: int | None) -> Images:
    if limit is None or limit >= len(images.labels):
        return images
    return images.take(np.random.default_rng(0).permutation(len(images.labels))[:limit])


def _read(
    source: str, config: str | None, columns: Columns, splits: tuple[str, str | None], key: str
) -> dict[str, Images]:
    path = Path(source).expanduser()
    if source == DIGITS:
        parts = read_digits(key)
    elif path.is_dir():
        parts = read_local(path, config, columns, key)
    elif path.is_file() and path.suffix in _ENDINGS:
        parts = read_npz(path, key) if path.suffix == ".npz" else read_local(path, config, columns, key)
    elif path.is_file() or path.suffix in _ENDINGS or source.startswith((".", "/", "~")):
        what = f"is no {' or '.join(_ENDINGS)} file" if path.is_file() else "does not exist"
        raise QawareError(f"{key}: {source!r} {what} (seen from {Path.cwd()}); check the path")
    else:
        wanted = [splits[0], splits[1]] if splits[1] else [splits[0], *_HELD_OUT]
        parts = read_hub(source, config, columns, [name for name in wanted if name], key)
    kept = {name: images for name, images in parts.items() if len(images.pixels)}
    if not kept:
        raise QawareError(f"{key}: there are no images in {source!r}; give a source that has some")
    return kept


def _pick(parts: dict[str, Images], name: str, key: str, source: str) -> Images:
    if name not in parts:
        raise QawareError(f"{key}: {source!r} has no split {name!r}, but {', '.join(parts)}; name one")
    return parts[name]


def _val_split(parts: dict[str, Images], splits: tuple[str, str | None]) -> str | None:
    if splits[1] is not None:
        return splits[1]
    return next((name for name in _HELD_OUT if name in parts and name != splits[0]), None)
