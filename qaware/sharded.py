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

# What `fully_shard` leaves on a module for the compiler.
_TRACES = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


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
    """While open, ``copy.deepcopy(model, memo)`` with the yielded memo gives a plain CPU copy, which then
    needs :func:`forget_sharding`. A collective: every rank must enter, and each holds the whole model.
    """
    sharded: list[Any] = [m for m in model.modules() if is_sharded(m)]
    if not sharded:
        yield {}
        return
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    for module in sharded:
        # After a forward pass the root keeps whole parameters, in the precision of the computation.
        module.reshard()
    memo: dict[int, Any] = {id(p): _gather(p) for p in model.parameters()}
    kept = [(m, type(m), {k: vars(m).pop(k, None) for k in (STATE_KEY, REGISTRY_KEY)}) for m in sharded]
    try:
        for module in sharded:
            module.__class__ = plain_class(module)
        yield memo
    finally:
        for module, cls, state in kept:
            module.__class__ = cls
            vars(module).update(state)


def forget_sharding(duplicate: nn.Module) -> None:
    """Take FSDP2's hooks, which would gather the parameters of the original, off a copy of it."""
    for module in duplicate.modules():
        for name in _TRACES:
            vars(module).pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                    del hooks[key]


def _gather(parameter: nn.Parameter) -> nn.Parameter:
    from torch import nn

    value: Any = parameter.detach()
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return nn.Parameter(full.cpu().clone(), requires_grad=parameter.requires_grad)
