"""Find out from the Trainer's own data what a model is scored on and which inputs it takes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from qaware.callbacks.nested import validate
from qaware.errors import QawareError
from qaware.exporters.signature import first_tensor, value_range
from qaware.metrics.windows import Windows
from qaware.tasks import (
    ClassificationTask,
    LanguageTask,
    Task,
    UnscoredTask,
    batch_signature,
    language_signature,
    with_bounds,
)


@dataclass
class Call:
    """One call of the target while the user's validation step ran."""

    tensors: list[Tensor]
    keywords: list[str | None]
    output: torch.Size
    """Shape of the first output tensor; the values are of no use, and logits are large."""
    labels: Tensor | None


class _Recorder(Callback):
    """Keeps the tensors that enter and leave ``target``, whatever its signature."""

    def __init__(self, target: nn.Module) -> None:
        self.calls: list[Call] = []
        self._batch: Any = None
        self._handle = target.register_forward_hook(self._record, with_kwargs=True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        self._batch = batch

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        pairs = [(None, a) for a in args] + list(kwargs.items())
        named = [(k, v.detach().cpu()) for k, v in pairs if isinstance(v, Tensor)]
        if named:
            shape = first_tensor(output).shape
            labels = _labels(self._batch, shape)
            self.calls.append(Call([t for _, t in named], [k for k, _ in named], shape, labels))

    def close(self) -> None:
        self._handle.remove()


def make_task(
    trainer: pl.Trainer, module: pl.LightningModule, target: str | None, metrics: Sequence[str], batches: int
) -> Task | None:
    """The task of a detached copy ``module``, from the Trainer's data; None without validation data.

    A datamodule with ``windows()`` (as :class:`qaware.lm.TextDataModule`) says itself what is scored (of it
    a ``fast_dev_run`` takes the first ``batches`` windows).
    Otherwise the validation step runs over up to ``batches`` validation batches while the target's
    inputs are recorded: token ids in and logits (B, T, V) out make a language task; logits (B, C) with
    labels in the batch make a classification task; anything else is exported and checked for parity,
    but has no score.

    Raises:
        QawareError: the target was never called.
    """
    datamodule = getattr(trainer, "datamodule", None)
    root = find_target(module, target)
    if datamodule is not None and hasattr(datamodule, "windows"):
        windows = datamodule.windows()
        dry = getattr(trainer, "fast_dev_run", False)
        return _from_windows(windows.head(batches) if dry else windows, module, root, metrics)
    loader = trainer.val_dataloaders if trainer.world_size == 1 else raw_loader(trainer, "val")
    if loader is None:
        return None
    recorder = _Recorder(root)
    try:
        validate(module, loader, batches, [recorder])
    finally:
        recorder.close()
    if not recorder.calls:
        raise QawareError(
            f"target: {target or type(module).__name__} was not called by validation_step; "
            "give target= the submodule that it calls"
        )
    return _from_calls(_all_ranks(recorder.calls), root, metrics)


def raw_loader(trainer: pl.Trainer, kind: str) -> Any:
    """The user's own loader, before Lightning gave each rank a share of it; None when there is none.

    Args:
        trainer: whose data; attached to the module.
        kind: ``"train"`` or ``"val"``.
    """
    fitting = trainer.state.fn == "fit"
    evaluation = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    source = trainer.fit_loop._data_source if kind == "train" else evaluation._data_source
    datamodule = getattr(trainer, "datamodule", None)
    if source.instance is None and datamodule is not None:  # e.g. training data while validating
        return getattr(datamodule, f"{kind}_dataloader")()
    return source.dataloader() if source.instance is not None and source.is_defined() else None


def _all_ranks(calls: list[Call]) -> list[Call]:
    """Ranks whose batches differ, because the user's loaders are sharded already, score the union."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return calls
    raw = (t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for c in calls for t in c.tensors)
    digest = hashlib.sha256(b"".join(raw)).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return calls
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, calls)
    return [call for share in shares for call in share]


def find_target(module: pl.LightningModule, target: str | None) -> nn.Module:
    """The module to quantize.

    Raises:
        QawareError: there is no such submodule; the ones there are are named.
    """
    if target is None:
        return module
    try:
        return module.get_submodule(target)
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_children())
        raise QawareError(
            f"target: {target!r} is not a submodule of {type(module).__name__}; it has {names}"
        ) from error


def _from_windows(
    windows: Windows, module: pl.LightningModule, root: nn.Module, metrics: Sequence[str]
) -> LanguageTask:
    longest = max(getattr(module, "context_length", None) or 0, max(len(w) for w in windows.ids))
    name, keyword = _ids_argument(root)
    example = windows.ids[0].unsqueeze(0)
    kwargs = {keyword: example} if keyword else {}
    bounds = value_range(root, lambda: root(*(() if keyword else (example,)), **kwargs), example)
    return LanguageTask(
        windows, language_signature(name, bounds[1] + 1 if bounds else None, longest, keyword), metrics
    )


def _ids_argument(root: nn.Module) -> tuple[str, str | None]:
    """The name of the token ids in ``forward``, and its keyword when it cannot be given by position."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    first = parameters[0] if parameters else None
    if first is not None and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        return first.name, None
    return "input_ids", "input_ids"


def _from_calls(calls: list[Call], root: nn.Module, metrics: Sequence[str]) -> Task:
    first = calls[0]
    ids = _ids_index(first)
    if ids is not None:
        return _language(calls, ids, root, metrics)
    signature = batch_signature(first.tensors, first.keywords, max(c.output[0] for c in calls))
    signature = with_bounds(signature, _bounds(first, root))
    inputs = [tuple(call.tensors) for call in calls]
    labels = [call.labels for call in calls if call.labels is not None]
    if len(first.output) == 2 and len(labels) == len(calls):
        return ClassificationTask(inputs, signature, labels, metrics)
    return UnscoredTask(inputs, signature)


def _ids_index(call: Call) -> int | None:
    """Which input holds the token ids: int64 (B, T) where the output is (B, T, V)."""
    for i, tensor in enumerate(call.tensors):
        if tensor.dtype == torch.int64 and len(call.output) == 3 and tensor.shape == call.output[:2]:
            return i
    return None


def _language(calls: list[Call], index: int, root: nn.Module, metrics: Sequence[str]) -> LanguageTask:
    """Rows without their right padding; a mask or labels beside the ids are not part of the signature."""
    rows = [row for call in calls for row in _rows(call, index)]
    longest = max(len(row) for row in rows)
    windows = Windows(tuple(rows), (1,) * len(rows), None, "unknown", longest, longest, False)
    keyword = calls[0].keywords[index]
    example = rows[0].unsqueeze(0)
    kwargs = {keyword: example} if keyword else {}
    bounds = value_range(root, lambda: root(*(() if keyword else (example,)), **kwargs), example)
    vocab_size = bounds[1] + 1 if bounds else None
    return LanguageTask(
        windows, language_signature(keyword or "input_ids", vocab_size, longest, keyword), metrics
    )


def _rows(call: Call, index: int) -> list[Tensor]:
    ids = call.tensors[index]
    mask = dict(zip(call.keywords, call.tensors, strict=True)).get("attention_mask")
    lengths = (
        mask.sum(-1).tolist() if mask is not None and mask.shape == ids.shape else [ids.shape[1]] * len(ids)
    )
    return [row[: int(length)] for row, length in zip(ids, lengths, strict=True) if length >= 2]


def _labels(batch: Any, output: torch.Size) -> Tensor | None:
    """The int64 tensor (B,) of the batch that is not an input."""
    items = list(batch.values()) if isinstance(batch, Mapping) else batch
    for item in reversed(items) if isinstance(items, (list, tuple)) else ():
        if isinstance(item, Tensor) and item.dtype == torch.int64 and item.shape == output[:1]:
            return item.detach().cpu()
    return None


def _bounds(call: Call, root: nn.Module) -> list[tuple[int, int] | None]:
    args = [t for k, t in zip(call.keywords, call.tensors, strict=True) if k is None]
    kwargs = {k: t for k, t in zip(call.keywords, call.tensors, strict=True) if k is not None}
    integer = (torch.int64, torch.int32)
    return [
        value_range(root, lambda: root(*args, **kwargs), t) if t.dtype in integer else None
        for t in call.tensors
    ]
