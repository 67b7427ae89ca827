"""Find out from the Trainer's own data what a model is scored on and which inputs it takes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from qaware.callbacks.kinds import LABELS, Call, task_of
from qaware.callbacks.nested import validate
from qaware.errors import QawareError
from qaware.exporters.signature import first_tensor, value_range
from qaware.metrics.windows import Windows
from qaware.tasks import LanguageTask, Task, language_signature


class _Recorder(Callback):
    """Keeps the tensors that enter and leave ``target``, whatever its signature."""

    def __init__(self, target: nn.Module) -> None:
        self.calls: list[Call] = []
        self.called = False
        self._batch: Any = None
        self._handle = target.register_forward_hook(self._record, with_kwargs=True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        self._batch = batch

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.called = True
        pairs = [(None, a) for a in args] + list(kwargs.items())
        named = [(k, v.detach().cpu()) for k, v in pairs if isinstance(v, Tensor)]
        if named:
            shape = first_tensor(output).shape
            inputs = [t for k, t in named if k not in LABELS]
            columns = _columns(self._batch, inputs, shape[0]) if shape else {}
            self.calls.append(Call([t for _, t in named], [k for k, _ in named], shape, columns))

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
    but has no score. None, too, where the target takes no tensors.

    Raises:
        QawareError: the target was never called, or the validation step failed.
    """
    datamodule = getattr(trainer, "datamodule", None)
    root = find_target(module, target)
    if datamodule is not None and hasattr(datamodule, "windows"):
        windows = datamodule.windows()
        dry = getattr(trainer, "fast_dev_run", False)
        return _from_windows(windows.head(batches) if dry else windows, module, root, metrics)
    loader = raw_loader(trainer, "val")
    if loader is None or trainer.limit_val_batches == 0 or not is_overridden("validation_step", module):
        return None
    calls = _record_calls(module, root, loader, batches, target or type(module).__name__)
    return task_of(_all_ranks(calls), root, metrics) if calls else None


def _record_calls(
    module: pl.LightningModule, root: nn.Module, loader: Any, batches: int, name: str
) -> list[Call]:
    recorder = _Recorder(root)
    try:
        validate(module, loader, batches, [recorder])
    except QawareError:
        raise
    except Exception as error:  # whatever the user's step does in a Trainer that is not his
        raise QawareError(
            "validation_step: qaware runs it in a Trainer of its own, to see the inputs, and there it failed "
            f"({type(error).__name__}: {' '.join(str(error).split())}); repair it, or use score=False"
        ) from error
    finally:
        recorder.close()
    if not recorder.called:
        raise QawareError(
            f"target: {name} was not called by validation_step; give target= the submodule that it calls"
        )
    if not recorder.calls:
        rank_zero_info(f"qaware: {name} takes no tensors but something that holds them, so it is not scored")
    return recorder.calls


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


def _columns(batch: Any, tensors: list[Tensor], size: int) -> dict[Hashable, Tensor]:
    """The int64 tensors (B,) of a batch that did not enter the target by position, by key or place."""
    items = dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(batch, (list, tuple)):
        items = dict(enumerate(batch))
    found = {k: v.detach().cpu() for k, v in items.items() if isinstance(v, Tensor) and v.shape == (size,)}
    return {
        k: v
        for k, v in found.items()
        if v.dtype == torch.int64 and not any(v.shape == x.shape and torch.equal(v, x) for x in tensors)
    }
