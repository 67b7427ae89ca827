"""Deep copies of modules, with what users and PyTorch leave on them."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qaware.errors import QawareError

Module = TypeVar("Module", bound=nn.Module)
_STRUCTURE = ("_parameters", "_buffers", "_modules")


def deep_copy(model: Module, memo: dict[int, Any] | None = None) -> Module:
    """A deep copy that knows no Trainer.

    Args:
        model: any module, also one that keeps tensors of an autograd graph.
        memo: by the ``id`` of objects, what stands for them in the copy.

    Raises:
        QawareError: something on the module cannot be copied; names the attribute.
    """
    trainer = getattr(model, "_trainer", None)
    stand_ins = {**_graph_tensors(model), id(trainer): None, **(memo or {})}
    try:
        return copy.deepcopy(model, dict(stand_ins))
    except Exception as error:  # each type that cannot be copied raises its own
        name = _culprit(model, stand_ins) or type(model).__name__
        raise QawareError(
            f"{name}: cannot be copied, and it is a copy that is scored and quantized "
            f"({' '.join(str(error).split())}); make it when it is needed, or leave it out in __getstate__"
        ) from error


def _graph_tensors(model: nn.Module) -> dict[int, Any]:
    """Stand-ins for tensors that hang in an autograd graph, which cannot be deep-copied. Users keep such
    tensors (``self.outputs.append(loss)``), and so does ``torch.nn.utils.prune``.
    """
    kept = (value for module in model.modules() for value in tree_leaves(dict(vars(module))))
    return {id(t): t.detach().clone() for t in kept if isinstance(t, torch.Tensor) and not t.is_leaf}


def _culprit(model: nn.Module, stand_ins: dict[int, Any]) -> str | None:
    """The first attribute that cannot be copied by itself."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in _STRUCTURE or key.startswith("_trainer"):
                continue
            try:
                copy.deepcopy(value, dict(stand_ins))
            except Exception:  # whatever it was above
                return f"{name}.{key}" if name else key
    return None
