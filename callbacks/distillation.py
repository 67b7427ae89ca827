"""Distillation: train the quantized model towards the outputs of the float model that it was.

The loss is the forward Kullback-Leibler divergence of the output distributions: knowledge distillation
(Hinton et al. 2015, arXiv:1503.02531) at temperature 1. That a quantized model learns from the logits of its
own float version is the method of LLM-QAT (Liu et al. 2023, arXiv:2305.17888) and of quantization-aware
distillation in NVIDIA's Model Optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from qaware.callbacks.data import find_target
from qaware.callbacks.hooks import override, restore
from qaware.callbacks.nested import detached_copy
from qaware.engines.fake_quant import set_fake_quant
from qaware.errors import QawareError
from qaware.exporters.signature import first_tensor

NAME = "qaware/kl"
_HOOK = "training_step"


class _Call(NamedTuple):
    """One call of the student."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Distillation:
    """Makes ``training_step`` return ``(1 - weight) * its own loss + weight * KL(float || quantized)``.

    The divergence is in nats: the mean over all rows of the last dimension of the logits that ``target``
    returns, over all its calls in a step. Positions where a keyword ``attention_mask`` of the logits' leading
    shape is 0 are left out. It is computed in float32 whatever the precision of training, and logged as
    ``qaware/kl``.

    The teacher runs in evaluation mode beside every step, and takes the memory of the float weights once
    more. It is no part of the LightningModule: no optimizer and no ``state_dict`` knows it.
    """

    def __init__(self, weight: float, target: str | None = None) -> None:
        """
        Args:
            weight: share of the divergence in the loss, from 0 to 1 (no loss but the divergence).
            target: name of the submodule that returns the logits; None for the whole module.

        Raises:
            QawareError: ``weight`` is no share.
        """
        self.weight = require_share(weight)
        self.target = target
        self._teacher: nn.Module | None = None
        self._weights: dict[str, Tensor] | None = None
        self._module: pl.LightningModule | None = None

    def attach(self, pl_module: pl.LightningModule, teacher: nn.Module | None) -> None:
        """Call when training starts, with weights restored and on their device; calling it again is harmless.
        On sharded modules it is a collective.

        Args:
            pl_module: prepared; its ``training_step`` is overridden until :meth:`detach`.
            teacher: the float model (see :func:`float_copy`), which is moved to the device; None where
                training has gone past it. A teacher that is known already, from a checkpoint or an earlier
                fit of the same module, comes before it.

        Raises:
            QawareError: there is no teacher, or ``training_step`` returns no loss to the Trainer.
        """
        require_loss(pl_module)
        if self._weights is not None:
            teacher = teacher or float_copy(pl_module, self.target)
            teacher.load_state_dict(self._weights)
        if teacher is None:
            raise QawareError(
                "distillation: the checkpoint was trained with rounding and holds no float model to learn "
                "from; resume one that was trained with distillation, or start from a float checkpoint"
            )
        self._weights = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
        self._teacher = teacher.to(pl_module.device).eval().requires_grad_(False)
        self._module = pl_module
        override(pl_module, _HOOK, self._training_step)

    def detach(self) -> None:
        """Give ``training_step`` back, and let go of all but the teacher's weights; does nothing twice."""
        if self._module is not None:
            restore(self._module, _HOOK)
        self._module = self._teacher = None

    def forget(self) -> None:
        """Drop the teacher's weights: the next fit is of another module."""
        self.detach()
        self._weights = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU by name, or nothing where there is no teacher yet. Part of the callback's state
        in a checkpoint, which holds nothing else that the float model could be made from."""
        return {} if self._weights is None else {"teacher": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, before :meth:`attach`."""
        self._weights = state.get("teacher")

    def _training_step(self, module: pl.LightningModule, original: Any, *args: Any) -> Any:
        student = find_target(module, self.target)
        calls: list[_Call] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Activation checkpointing calls again inside backward.
            recomputed = torch._C._current_graph_task_id() != -1
            if student.training and torch.is_grad_enabled() and not recomputed:
                calls.append(_Call(args, kwargs, output))

        handle = student.register_forward_hook(record, with_kwargs=True)
        try:
            output = original(*args)
        finally:
            handle.remove()
        own = _own_loss(output)
        if own is None:
            return output
        loss = self._loss(module, own, calls)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _loss(self, module: pl.LightningModule, own: Tensor, calls: list[_Call]) -> Tensor:
        name = self.target or type(module).__name__
        if not calls:
            raise QawareError(
                f"target: training_step did not call {name} in training mode with gradients on, so there is "
                "nothing to distil; give target= the submodule that it calls"
            )
        kl = self._divergence(calls, name)
        module.log(NAME, kl.detach(), on_step=True, on_epoch=False)
        return (1 - self.weight) * own + self.weight * kl

    def _divergence(self, calls: list[_Call], name: str) -> Tensor:
        """Mean over the rows of all calls; 0 where every position is masked."""
        assert self._teacher is not None
        total, rows = [], []
        for call in calls:
            logits = _logits(call.output, name)
            with torch.no_grad():
                reference = _logits(self._teacher(*call.args, **call.kwargs), name)
            divergence = kl_rows(reference, logits)
            keep = _mask(call.kwargs, divergence)
            total.append((divergence * keep).sum())
            rows.append(keep.sum())
        return torch.stack(total).sum() / torch.stack(rows).sum().clamp(min=1)


def float_copy(pl_module: pl.LightningModule, target: str | None) -> nn.Module:
    """A copy of ``target`` on the CPU, in evaluation mode, whose forward pass does not round: the float
    model, as long as no step was trained with rounding. A collective where the module is sharded."""
    teacher = find_target(detached_copy(pl_module), target)
    set_fake_quant(teacher, False)
    return teacher


def kl_rows(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) in nats: two (..., V) of any float dtype -> (...) float32.
    Classes that both rule out with minus infinity count nothing."""
    lowest = torch.finfo(torch.float32).min
    theirs, mine = (x.float().log_softmax(-1).clamp(min=lowest) for x in (reference, logits))
    return (theirs.exp() * (theirs - mine)).sum(-1)


def require_share(weight: float) -> float:
    """``weight`` as a float.

    Raises:
        QawareError: it is not between 0 and 1.
    """
    if not isinstance(weight, (int, float)) or math.isnan(weight) or not 0 <= weight <= 1:
        raise QawareError(
            f"distillation: {weight!r} must be a share of the loss between 0 (none) and 1 (no other loss)"
        )
    return float(weight)


def require_loss(pl_module: pl.LightningModule) -> None:
    """Refuse a module whose loss cannot be added to.

    Raises:
        QawareError: it optimizes by hand, or its ``training_step`` was replaced on the instance.
    """
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise QawareError(
            f"distillation: {name} optimizes manually, so its loss is not returned to the Trainer; "
            "use automatic optimization, or distillation=0"
        )
    restore(pl_module, _HOOK)
    if _HOOK in vars(pl_module):
        raise QawareError(
            f"distillation: training_step of this {name} was replaced, as torch.compile(module) does; "
            "compile the submodule instead (module.net.compile()), or use distillation=0"
        )


def _own_loss(output: Any) -> Tensor | None:
    """The loss in what ``training_step`` returned; None where it skips the batch, or is not legal."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _logits(output: Any, name: str) -> Tensor:
    logits = first_tensor(output)
    if not logits.is_floating_point() or logits.ndim == 0 or logits.shape[-1] < 2:
        raise QawareError(
            f"distillation: {name} returns {logits.dtype} of shape {tuple(logits.shape)}, which is no "
            "distribution over classes; give target= the submodule that returns the logits, or distillation=0"
        )
    return logits


def _mask(kwargs: Mapping[str, Any], rows: Tensor) -> Tensor:
    """1 for each of ``rows`` that counts and 0 for padding, in float32."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == rows.shape:
        return (mask != 0).to(rows)
    return torch.ones_like(rows)
