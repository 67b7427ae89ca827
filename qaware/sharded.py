"""Modules sharded by FSDP2: their class, and a whole copy of them.

``fully_shard`` gives a module a class of its own, which forbids copying, and turns its parameters into
DTensors. To prepare a sharded layer its class is changed underneath; to score and to convert, every rank
gathers a plain copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on ``module`` itself."""
    # A class of the name that FSDP2 gives; its package is expensive to import and absent in some builds.
    return any(
        c.__name__ == "FSDPModule" and c.__module__.startswith("torch.") for c in type(module).__bases__
    )


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user wrote, under FSDP2's."""
    cls: type[nn.Module] = type(module).__bases__[1] if is_sharded(module) else type(module)
    return cls


def set_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Change the class of ``module`` in place; a sharded one stays sharded."""
    if is_sharded(module):
        old = type(module)
        forbid_copy = {"__deepcopy__": old.__dict__["__deepcopy__"]}
        new = type(f"FSDP{new.__name__}", (old.__bases__[0], new), forbid_copy)
    module.__class__ = new


@contextmanager
def copyable(model: nn.Module) -> Iterator[dict[int, Any]]:
    """While open, ``copy.deepcopy(model, memo)`` with the yielded memo gives a plain CPU copy.

    For a sharded model a collective: every rank must enter, and each then holds the whole model.
    """
    sharded: list[Any] = [m for m in model.modules() if is_sharded(m)]
    for module in sharded:
        # After a forward pass the root keeps whole parameters, in the precision of the computation.
        module.reshard()
    memo: dict[int, Any] = {id(p): _gather(p) for p in model.parameters()} if sharded else {}
    kept = [(m, type(m), _strip(m)) for m in (model.modules() if sharded else ())]
    try:
        for module in sharded:
            module.__class__ = plain_class(module)
        yield memo
    finally:
        for module, cls, removed in kept:
            module.__class__ = cls
            vars(module).update(removed)


def _strip(module: nn.Module) -> dict[str, Any]:
    """Take off ``module`` what FSDP2 left on it, which holds process groups; returns what to put back."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    names = (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params")
    removed = {name: vars(module).pop(name) for name in names if name in vars(module)}
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        removed[name] = vars(module)[name]
        own = [(key, hook) for key, hook in removed[name].items() if not _of_fsdp(hook)]
        vars(module)[name] = type(removed[name])(own)
    return removed


def _of_fsdp(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")


def _gather(parameter: nn.Parameter) -> nn.Parameter:
    from torch import nn

    value: Any = parameter.detach()
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return nn.Parameter(full.cpu().clone(), requires_grad=parameter.requires_grad)
