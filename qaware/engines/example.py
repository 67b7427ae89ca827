"""An example of a model's inputs: what an engine runs or exports a model with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Example:
    """The arguments of one call of a module.

    args: the positional arguments, in order. kwargs: the keyword arguments by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, module: nn.Module) -> Any:
        """What `module` returns for these arguments; neither its mode nor gradients are touched."""
        return module(*self.args, **self.kwargs)

    def to(self, device: torch.device) -> Example:
        """The same with its tensors on ``device``."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Example(tree_map(move, self.args), tree_map(move, self.kwargs))

    def copy(self) -> Example:
        """One that a module may change, with tensors on the CPU. Objects that cannot be copied are shared."""
        return Example(tree_map(_copied, self.args), tree_map(_copied, self.kwargs))


class _Found(Exception):
    """Ends a run as soon as the inputs are known."""


def capture(module: nn.Module, run: Callable[[], Any]) -> Example | None:
    """The arguments of the first call of ``module`` that ``run`` makes, which ends there; None without one.

    Tensors are copied to the CPU. The module itself does not run.
    """
    found: list[Example] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Example(args, kwargs).copy())
        raise _Found

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    except _Found:
        pass
    finally:
        handle.remove()
    return found[0] if found else None


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, nn.Module):
        return value
    try:  # a cache of keys and values grows with each call
        return copy.deepcopy(value)
    except Exception:  # each type that cannot be copied raises its own
        return value
