"""Where documents come from: local files, Python's own documentation, or a dataset on the hub.

A source is ``"python-docs"``, local ``.txt``, ``.jsonl`` or ``.parquet`` files (names or globs), or the
name of a dataset on the hub.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qaware.errors import QawareError
from qaware.files import sha256
from qaware.lm.loading import hub_answers, one_line, only_cached_datasets, quiet_datasets

PYTHON_DOCS = "python-docs"
_ROWS = {".jsonl": "json", ".parquet": "parquet"}
"""Endings of files that hold rows, and the builders of `datasets` that read them."""
_ENDINGS = (".txt", *_ROWS)

Source = str | list[str]


def is_hub(source: Source) -> bool:
    """Whether a source is the name of a dataset on the hub, rather than local or built in."""
    if isinstance(source, list) or source == PYTHON_DOCS:
        return False
    local = Path(source).suffix in _ENDINGS or glob.has_magic(source) or source.startswith((".", "/", "~"))
    return not local and not Path(source).exists()


def source_hash(source: Source, key: str = "source") -> str:
    """Sha256 of what a source contains: the bytes of its files, or its name when it is on the hub."""
    if is_hub(source):
        parts = [f"hub:{source}".encode()]
    elif source == PYTHON_DOCS:
        parts = [text.encode() + b"\0" for text in _python_docs()]
    else:
        parts = [f"{file.suffix}:{sha256(file)}".encode() for file in _local_files(source, key)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def read_documents(
    source: Source,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    separator: str | None = None,
    limit: int | None = None,
    key: str = "source",
) -> list[str]:
    """The documents of a source, stripped, empty ones left out, at most ``limit`` of them.

    ``config`` and ``split`` choose a part of a hub dataset, ``text_field`` the column of rows; ``separator``
    stands between the documents of a ``.txt`` file (without one a file is a document); ``key`` is the option
    that errors name. Raises QawareError when a file, field or the hub is missing, or there is no text.
    """
    if is_hub(source):
        raw = _hub_rows(str(source), config, split, text_field, key)
    elif source == PYTHON_DOCS:
        raw = iter(_python_docs())
    else:
        files = _local_files(source, key)
        raw = itertools.chain.from_iterable(_file_texts(file, text_field, separator, key) for file in files)
    documents = (text.strip() for text in raw)
    kept = list(itertools.islice(filter(None, documents), limit))
    if not kept:
        raise QawareError(f"{key}: there is no text in {source!r}; give a source that has some")
    return kept


def hold_out(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The last ``fraction`` of the documents, or of the one document, apart from the rest."""
    if len(documents) > 1:
        kept = len(documents) - min(len(documents) - 1, max(1, round(len(documents) * fraction)))
        return documents[:kept], documents[kept:]
    words = re.split(r"(?<=\s)(?=\S)", documents[0])  # a cut inside a word would make odd tokens
    lengths = np.cumsum([len(word) for word in words])
    kept = max(1, int(np.searchsorted(lengths, (1 - fraction) * lengths[-1])))
    if kept >= len(words):
        raise QawareError(
            f"val_fraction: one document of {lengths[-1]} characters is too short to hold out {fraction} of "
            "it; give more text or a val_source"
        )
    return ["".join(words[:kept]).strip()], ["".join(words[kept:])]


def _local_files(source: Source, key: str) -> list[Path]:
    """The files of a local source in the order given, those of a glob by name; QawareError if none."""
    names = [source] if isinstance(source, str) else source
    files = [file for name in names for file in _expand(Path(name).expanduser(), key)]
    for file in files:
        if file.suffix not in _ENDINGS or not os.access(file, os.R_OK) or file.is_dir():
            raise QawareError(
                f"{key}: {str(file)!r} is not a readable {', '.join(_ENDINGS)} file; "
                "name such files, or a glob"
            )
    return files


def _expand(name: Path, key: str) -> list[Path]:
    found = [name] if name.exists() else [Path(file) for file in sorted(glob.glob(str(name), recursive=True))]
    if not found:
        raise QawareError(f"{key}: {str(name)!r} does not exist (seen from {Path.cwd()}); check the path")
    return found


def _python_docs() -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def _file_texts(file: Path, text_field: str, separator: str | None, key: str) -> Iterator[str]:
    try:
        if file.suffix in _ROWS:
            yield from _file_rows(file, text_field)
        else:
            text = file.read_text(encoding="utf-8")
            yield from text.split(separator) if separator else [text]
    except QawareError:
        raise
    except Exception as error:  # datasets wraps whatever its parsers raise
        cause = one_line(error.__cause__ or error)
        raise QawareError(
            f"{key}: {str(file)!r} cannot be read as {file.suffix} ({cause}); fix it"
        ) from error


def _file_rows(file: Path, text_field: str) -> Iterator[str]:
    import datasets

    # A folder of our own: the cache of `datasets` would keep a second copy, and tells files apart by time.
    with tempfile.TemporaryDirectory() as scratch:
        with quiet_datasets():
            rows = datasets.load_dataset(
                _ROWS[file.suffix], data_files=str(file), split="train", cache_dir=scratch
            )
        yield from _column(rows, text_field, str(file))


def _hub_rows(name: str, config: str | None, split: str, text_field: str, key: str) -> Iterator[str]:
    import datasets

    try:
        with only_cached_datasets(not hub_answers()):
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, name, config and split each raise their own
        raise QawareError(
            f"{key}: {name!r} (config {config!r}, split {split!r}) is no local file and could not be read "
            f"from the hub ({one_line(error)}); check the name and the connection, or give a local file"
        ) from error
    yield from _column(rows, text_field, name)


def _column(rows: Any, text_field: str, where: str) -> Iterator[str]:
    fields = ", ".join(rows.column_names)
    if text_field not in rows.column_names:
        raise QawareError(f"text_field: {text_field!r} is not in {where!r}, which has {fields}; name one")
    for value in rows[text_field]:
        if not isinstance(value, str | None):
            kind = type(value).__name__
            raise QawareError(
                f"text_field: {text_field!r} of {where!r} is {kind}, not text; choose of {fields}"
            )
        yield value or ""
