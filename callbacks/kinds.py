"""What the recorded calls of a model are: a language model's, a classifier's, or neither."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

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

LABELS = ("labels", "label", "targets", "target", "y")
"""Names that tell which of several columns holds the classes."""


@dataclass
class Call:
    """One call of the target while the user's validation step ran."""

    tensors: list[Tensor]
    keywords: list[str | None]
    output: torch.Size
    """Shape of the first output tensor; the values are of no use, and logits are large."""
    columns: dict[Hashable, Tensor]
    """By key or position in the batch: what may be labels, int64 (B,)."""


def task_of(calls: list[Call], root: nn.Module, metrics: Sequence[str]) -> Task | None:
    """What the calls of ``root``, a float model in evaluation mode, can be scored by; None, with a line that
    says why, where its output is no batch at all."""
    if not calls[0].output:
        rank_zero_info("qaware: forward returns a scalar first, e.g. its loss, so it is not scored")
        return None
    ids = _ids_index(calls[0])
    if ids is not None and _is_causal(calls[0], ids, root):
        return _language(calls, ids, root, metrics)
    labels = _labels(calls)
    calls = [_without_labels(call, root) for call in calls]
    first = calls[0]
    signature = batch_signature(first.tensors, first.keywords, max(c.output[0] for c in calls))
    signature = with_bounds(signature, _bounds(first, root))
    inputs = [tuple(call.tensors) for call in calls]
    if labels is not None:
        return ClassificationTask(inputs, signature, labels, metrics)
    return UnscoredTask(inputs, signature)


def _ids_index(call: Call) -> int | None:
    """Which input holds the token ids: int64 (B, T) below V where the output is (B, T, V)."""
    for i, tensor in enumerate(call.tensors):
        fits = tensor.dtype == torch.int64 and len(call.output) == 3 and tensor.shape == call.output[:2]
        if fits and tensor.shape[1] > 1 and int(tensor.max()) < call.output[2]:
            return i
    return None


@torch.no_grad()
def _is_causal(call: Call, index: int, root: nn.Module) -> bool:
    """Whether the ids alone make the outputs, and none depends on a later token; else no perplexity."""
    rows = _rows(call, index)
    if not rows:
        return False
    ids, keyword = rows[0].unsqueeze(0), call.keywords[index]
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % call.output[2]
    try:
        a, b = (first_tensor(root(**{keyword: x}) if keyword else root(x)) for x in (ids, other))
    except Exception:  # it needs more than the ids, whatever it raises then
        return False
    causal = a.dim() == 3 and torch.allclose(a[:, :-1].float(), b[:, :-1].float(), rtol=1e-3, atol=1e-4)
    if not causal:
        rank_zero_info("qaware: outputs depend on later tokens, so there is no perplexity, and no score")
    return causal


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


def _labels(calls: list[Call]) -> list[Tensor] | None:
    """The classes of each batch: the column whose values are all classes of a (B, C) output."""
    output = calls[0].output
    if len(output) != 2 or output[1] < 2:
        return None
    keys = [
        key for key in calls[0].columns if all(_are_classes(c.columns.get(key), output[1]) for c in calls)
    ]
    if len(keys) > 1:
        keys = [key for key in keys if key in LABELS] or keys
    if len(keys) > 1:
        names = ", ".join(map(str, keys))
        rank_zero_info(
            f"qaware: columns {names} of a batch may all be labels, so nothing is scored; "
            f"name the right one {LABELS[0]!r} in a dict to have it scored"
        )
    return [call.columns[keys[0]] for call in calls] if len(keys) == 1 else None


def _are_classes(column: Tensor | None, count: int) -> bool:
    return column is not None and bool(((column >= 0) & (column < count)).all())


def _without_labels(call: Call, root: nn.Module) -> Call:
    """Labels are no input of the model that ships, where forward does without them."""
    parameters = inspect.signature(root.forward).parameters
    optional = {k for k in LABELS if k in parameters and parameters[k].default is not inspect.Parameter.empty}
    kept = [(t, k) for t, k in zip(call.tensors, call.keywords, strict=True) if k not in optional]
    return Call([t for t, _ in kept], [k for _, k in kept], call.output, call.columns)


def _bounds(call: Call, root: nn.Module) -> list[tuple[int, int] | None]:
    args = [t for k, t in zip(call.keywords, call.tensors, strict=True) if k is None]
    kwargs = {k: t for k, t in zip(call.keywords, call.tensors, strict=True) if k is not None}
    integer = (torch.int64, torch.int32)
    return [
        value_range(root, lambda: root(*args, **kwargs), t) if t.dtype in integer else None
        for t in call.tensors
    ]
