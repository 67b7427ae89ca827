"""What an artifact needs beside it in order to be scored or to generate: how the data became inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PLAIN = (str, int, float, bool, type(None))


def carry_inputs(data: Any, folder: Path, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """Copy the tokenizer of a data module into ``folder``, or say how its images were prepared.

    Args:
        data: a LightningDataModule with ``save_tokenizer(folder)`` (as :class:`qaware.lm.TextDataModule`) or
            ``preprocessing()`` (as :class:`qaware.vision.ImageDataModule`); of any other nothing is known.
        folder: of the artifacts.
        arguments: those that made ``data``; default the plain ones among its ``hparams``.

    Returns:
        For the sidecars, by ``tokenizer`` or ``preprocessing``, and ``data``.
    """
    if arguments is None:
        given = getattr(data, "hparams", {})
        arguments = {key: value for key, value in given.items() if isinstance(value, _PLAIN)}
    if hasattr(data, "save_tokenizer"):
        data.save_tokenizer(folder / "tokenizer")
        return {"tokenizer": "tokenizer", "data": arguments}
    if hasattr(data, "preprocessing"):
        return {"preprocessing": data.preprocessing(), "data": arguments}
    return {}
