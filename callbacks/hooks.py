"""Run code at moments of a LightningModule that Lightning offers no callback hook for.

There is no callback hook between ``configure_model`` and the restoring of a checkpoint, and
``ModelCheckpoint(save_weights_only=True)`` skips the callbacks' ``on_save_checkpoint``. The module's
own hooks run at these moments, so they are overridden on the instance and put back at teardown; all but
``on_save_checkpoint``, which marks the checkpoints of a prepared module for as long as it is prepared.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

NAMES = ("configure_model", "on_load_checkpoint", "training_step")
_MARK = "qaware_override"


def override(pl_module: pl.LightningModule, name: str, around: Callable[..., Any]) -> None:
    """Make ``pl_module.name(*args)`` call ``around(pl_module, original, *args)``.

    The original is the class's method, never an earlier override: repeated fits must not nest. A bound
    method rather than a closure, because ``copy.deepcopy`` then rebinds it to the copy; of the same name,
    because that is how a bound method is pickled.
    """
    original = getattr(type(pl_module), name)

    def method(self: pl.LightningModule, *args: Any) -> Any:
        return around(self, functools.partial(original, self), *args)

    method.__name__ = name
    setattr(method, _MARK, True)
    if original is not getattr(pl.LightningModule, name):
        # Lightning asks for the parameters of training_step to know which to pass.
        functools.update_wrapper(method, getattr(original, "__wrapped__", original), (), ())
    object.__setattr__(pl_module, name, types.MethodType(method, pl_module))


def restore(pl_module: pl.LightningModule, *names: str) -> None:
    """Remove the overrides of a run, or only those of ``names``; what others put there stays, as the
    ``training_step`` of a compiled module."""
    for name in names or NAMES:
        if hasattr(vars(pl_module).get(name), _MARK):
            del pl_module.__dict__[name]
