"""Tokenizers: load or train one, tell them apart, and turn documents into ids and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qaware.errors import QawareError
from qaware.files import sha256
from qaware.lm.loading import hub_answers, one_line

BOS, EOS = "<|bos|>", "<|eos|>"
SMALLEST_VOCAB = 258
"""256 bytes, so that nothing is unknown, and the two special tokens."""
_USUAL = {
    "bos_token": (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos_token": (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}

IntArray = npt.NDArray[np.int32]


def tokenizer_hash(tokenizer: str | int) -> str:
    """Sha256 of what a tokenizer is made from: its files, its name on the hub, or the size to train."""
    path = _local(str(tokenizer))
    if isinstance(tokenizer, int) or not path.exists():
        parts = [repr(tokenizer)]
    else:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.suffix in (".json", ".txt", ".model") and file.is_file()]
        parts = [f"{file.name}:{sha256(file)}" for file in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def load_tokenizer(name: str) -> Any:
    """A ``PreTrainedTokenizerFast`` from a folder, a ``tokenizer.json`` or the hub; QawareError if none."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = _local(name)
    try:
        if path.is_file():
            return _wrap(Tokenizer.from_file(str(path)))
        where, only_files = (str(path), True) if path.is_dir() else (name, not hub_answers())
        found = AutoTokenizer.from_pretrained(where, local_files_only=only_files, trust_remote_code=False)
    except Exception as error:  # a broken file, a missing one and no network each raise their own
        raise QawareError(
            f"tokenizer: {name!r} could not be loaded from a folder, a tokenizer.json or the hub "
            f"({one_line(error)}); check the path and the connection, or give a vocabulary size to train one"
        ) from error
    if not isinstance(found, PreTrainedTokenizerFast):
        raise QawareError(f"tokenizer: {name!r} has no fast version (tokenizer.json); choose one that has")
    return found


def _local(name: str) -> Path:
    """The folder or file that a name stands for, if it is local.

    A tokenizer.json stands for its folder where a tokenizer_config.json beside it names BOS and EOS.
    """
    path = Path(name).expanduser()
    return path.parent if path.is_file() and (path.parent / "tokenizer_config.json").is_file() else path


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE of at most ``vocab_size`` tokens, trained on ``documents``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return _wrap(backend)


def _wrap(backend: Any) -> Any:
    """A bare tokenizer with its BOS and EOS, recognised by the usual names."""
    from transformers import PreTrainedTokenizerFast

    vocab = backend.get_vocab()
    found = {role: next((name for name in names if name in vocab), None) for role, names in _USUAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in found.items() if v})


def encode(
    tokenizer: Any,
    documents: Sequence[str],
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    chunk: int = 256,
) -> Iterator[tuple[IntArray, IntArray]]:
    """For each document the ids of its tokens and the utf-8 bytes of each; int32, (tokens,).

    The bytes add up to the document's, so that bits per byte compare across tokenizers. The special tokens
    ``before`` and ``after`` each document, the only ones, stand for no bytes.
    """
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    for start in range(0, len(documents), chunk):
        some = list(documents[start : start + chunk])
        out = tokenizer(some, **options)
        for text, ids, offsets in zip(some, out["input_ids"], out["offset_mapping"], strict=True):
            framed = np.asarray([*before, *ids, *after], dtype=np.int32)
            yield framed, np.pad(_bytes_covered(text, offsets), (len(before), len(after)))


def _bytes_covered(text: str, offsets: list[tuple[int, int]]) -> IntArray:
    """Bytes from the furthest end so far to each token's end; the last token takes what is left over."""
    if not offsets:
        return np.zeros(0, dtype=np.int32)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    ends = np.concatenate([[0], np.cumsum(widths)])[np.asarray([end for _, end in offsets])]
    ends[-1] = widths.sum()
    return np.diff(np.maximum.accumulate(ends), prepend=0).astype(np.int32)
