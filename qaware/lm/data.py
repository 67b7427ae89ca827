"""Text for a causal language model: read once, tokenized once, cut into windows for training and scoring."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from qaware.errors import QawareError
from qaware.files import sha256
from qaware.lm import batches, cache, documents, options, tokens
from qaware.resumable import ResumableLoader, Shuffled

if TYPE_CHECKING:
    from qaware.metrics.windows import Windows


class TextDataModule(pl.LightningDataModule):
    """Windows of tokens from local text, Python's documentation or the hub, kept in a cache folder.

    Args:
        source: ``"python-docs"``, a ``.txt``, ``.jsonl`` or ``.parquet`` file, a glob, a list of these, or
            the name of a dataset on the hub. A hub dataset is cached by name, local files by content.
        tokenizer: a folder, a ``tokenizer.json``, a hub name, or the vocabulary size of a byte-level BPE to
            train on the training documents.
        val_source: text to validate and score on. Without one it is ``val_split`` of a hub source, else the
            last ``val_fraction`` of the documents (of the text, when there is one document).
        config, split, val_split: which parts of a hub dataset.
        text_field: the column of ``.jsonl``, ``.parquet`` and hub rows that holds the text.
        separator: what stands between the documents of a ``.txt`` file, e.g. ``"<|endoftext|>"``.
        block_size, batch_size: tokens of a window, windows of a batch.
        layout: ``packed`` joins documents with BOS and EOS and cuts the stream into windows; ``documents``
            makes one window of each: BOS first, cut at ``block_size``, padded only in training batches.
        max_documents: read at most so many documents from each source.
        max_val_windows: validate and score on the first so many windows.
        bos: put the tokenizer's BOS token before each document.
        seed: of the order of training windows, which also depends on the epoch, so a resume repeats it.
        cache_dir: where tokens are kept; default ``$QAWARE_CACHE``, else ``~/.cache/qaware``.

    Raises:
        QawareError: an option is out of range; later, a source, tokenizer or cache folder cannot be used.
    """

    def __init__(
        self,
        source: str | list[str],
        tokenizer: str | int = 2048,
        val_source: str | list[str] | None = None,
        config: str | None = None,
        split: str = "train",
        val_split: str = "validation",
        text_field: str = "text",
        separator: str | None = None,
        block_size: int = 128,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        layout: str = "packed",
        max_documents: int | None = None,
        max_val_windows: int | None = None,
        bos: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        # Not to the logger, where names such as `seed` would clash with those of the model.
        self.save_hyperparameters(logger=False)
        if isinstance(tokenizer, str) and tokenizer.isdecimal():  # as a command line gives it
            self.hparams["tokenizer"] = int(tokenizer)
        options.check(self.hparams)
        self.block_size, self.batch_size, self.layout, self.bos = block_size, batch_size, layout, bos
        self.cache_dir = Path(cache_dir or os.environ.get("QAWARE_CACHE") or "~/.cache/qaware").expanduser()

    @functools.cached_property
    def folder(self) -> Path:
        """The cache folder of this text and tokenizer. Reads local files once, to hash them."""
        return self.cache_dir / "text" / options.folder_name(self.hparams)

    @property
    def fingerprint(self) -> str:
        """Sha256 of everything that decides which tokens are trained on and scored."""
        return cache.digest([self.folder.name, self.block_size, self.hparams["max_val_windows"]])

    @functools.cached_property
    def tokenizer_obj(self) -> Any:
        """The ``PreTrainedTokenizerFast``, from the cache folder (which is filled if need be)."""
        from transformers import PreTrainedTokenizerFast

        self.prepare_data()
        return PreTrainedTokenizerFast.from_pretrained(str(self.folder / "tokenizer"), local_files_only=True)

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id: what a model must embed at least."""
        return int(max(self.tokenizer_obj.get_vocab().values())) + 1

    def save_tokenizer(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into ``folder``; its ``tokenizer.json`` has the hash in `windows`."""
        self.prepare_data()
        shutil.copytree(self.folder / "tokenizer", folder, dirs_exist_ok=True)

    def prepare_data(self) -> None:
        """Read and tokenize into the cache folder, unless it is there. Safe in several processes at once.

        Raises:
            QawareError: the text, the tokenizer or the cache folder cannot be used.
        """
        if self.folder.is_dir():
            return
        try:
            cache.publish(self._build, self.folder)
        except OSError as error:
            raise QawareError(
                f"cache_dir: {str(self.cache_dir)!r} cannot be written ({error.strerror or error}); "
                "set cache_dir or $QAWARE_CACHE to a folder that can"
            ) from error

    def _build(self, folder: Path) -> None:
        train, val = self._texts()
        wanted = self.hparams["tokenizer"]
        train_one = isinstance(wanted, int)
        tokenizer = tokens.train_tokenizer(train, wanted) if train_one else tokens.load_tokenizer(wanted)
        if self.bos and tokenizer.bos_token_id is None:
            raise QawareError(f"bos: tokenizer {wanted!r} has no BOS token; set bos to false or use another")
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        before = [tokenizer.bos_token_id] if self.bos else []
        # GPT-2 has one token for both, which need not stand twice between two documents.
        ends = self.layout == "packed" and tokenizer.eos_token_id not in (None, *before)
        after = [tokenizer.eos_token_id] if ends else []
        for name, texts in (("train", train), ("val", val)):
            cache.Stream.join(tokens.encode(tokenizer, texts, before, after)).save(folder / name)

    def _texts(self) -> tuple[list[str], list[str]]:
        """Training and validation documents, which overlap only when the user gives a text as both."""
        h: Any = self.hparams
        read = functools.partial(
            documents.read_documents,
            config=h.config,
            text_field=h.text_field,
            separator=h.separator,
            limit=h.max_documents,
        )
        train = read(h.source, split=h.split)
        if h.val_source is not None:
            return train, read(h.val_source, split=h.val_split, key="val_source")
        if documents.is_hub(h.source):
            return train, read(h.source, split=h.val_split)
        return documents.hold_out(train, h.val_fraction)

    def setup(self, stage: str | None = None) -> None:
        """Refuse text that makes too few windows for the stage. The tokens are opened and cut only once.

        Raises:
            QawareError: there is no validation window, or fewer than 2 training windows at a stage that
                trains (``fit``, or None for every stage).
        """
        if stage in (None, "fit"):
            self._require("training", self._train, 2)
        self._require("validation", self._val, 1)

    def _require(self, name: str, part: batches.Part, least: int) -> None:
        if len(part) < least:
            raise QawareError(
                f"block_size: {len(part.stream.ids)} {name} tokens make {len(part)} windows of "
                f"{self.block_size}, and at least {least} are needed; give more text or lower block_size"
            )

    @functools.cached_property
    def _train(self) -> batches.Part:
        stream, spans = self._cut("train")
        if self.layout == "packed":  # every training batch has one shape
            spans = spans[batches.lengths(spans) == self.block_size]
        return batches.Part(stream, spans)

    @functools.cached_property
    def _val(self) -> batches.Part:
        stream, spans = self._cut("val")
        return batches.Part(stream, spans[: self.hparams["max_val_windows"]])

    def _cut(self, name: str) -> tuple[cache.Stream, cache.Array]:
        self.prepare_data()
        stream = cache.Stream.open(self.folder / name)
        return stream, batches.cut(stream, self.block_size, self.layout)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled ``{"input_ids"}``, int64 (batch, tokens); padded documents come with ``labels`` too.
        Can be resumed in the middle of an epoch."""
        self.setup("fit")
        collate: Any = batches.stack
        if self.layout == "documents":
            collate = functools.partial(batches.pad, filling=self.tokenizer_obj.pad_token_id or 0)
        return ResumableLoader(
            self._train,
            batch_size=self.batch_size,
            sampler=Shuffled(self._train, self.hparams["seed"]),
            collate_fn=collate,
            num_workers=self.hparams["num_workers"],
            persistent_workers=self.hparams["num_workers"] > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation windows as ``{"input_ids"}``, unpadded: a batch holds windows of one length."""
        self.setup("validate")
        return DataLoader(batches.Batches(self._val, self.batch_size), batch_size=None)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def windows(self) -> Windows:
        """The validation windows to score: in each, every token after the first."""
        from qaware.metrics.windows import Windows

        self.setup("validate")
        return Windows(
            ids=tuple(self._val[i] for i in range(len(self._val))),
            first=(1,) * len(self._val),
            bytes=self._val.scored_bytes or None,
            tokenizer=sha256(self.folder / "tokenizer" / "tokenizer.json"),
            window=self.block_size,
            stride=self.block_size,
            bos=self.bos and self.layout == "documents",  # packed windows start anywhere in the stream
        )
