"""Run code at moments of a LightningModule that Lightning offers no callback hook for.

There is no callback hook between ``configure_model`` and the restoring of a checkpoint, and
``ModelCheckpoint(save_weights_only=True)`` skips the callbacks' ``on_save_checkpoint``. The module's
own hooks run at these moments, so they are overridden on the instance and put back at teardown.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

NAMES = ("configure_model", "on_load_checkpoint", "on_save_checkpoint")


def override(pl_module: pl.LightningModule, name: str, around: Callable[..., Any]) -> None:
    """Make ``pl_module.name(*args)`` call ``around(pl_module, original, *args)``.

    The original is the class's method, never an earlier override: repeated fits must not nest. A bound
    method rather than a closure, because ``copy.deepcopy`` then rebinds it to the copy.
    """
    original = getattr(type(pl_module), name)

    def method(self: pl.LightningModule, *args: Any) -> Any:
        return around(self, functools.partial(original, self), *args)

    object.__setattr__(pl_module, name, types.MethodType(method, pl_module))


def restore(pl_module: pl.LightningModule) -> None:
    """Remove every override; does nothing where there is none."""
    for name in NAMES:
        pl_module.__dict__.pop(name, None)
