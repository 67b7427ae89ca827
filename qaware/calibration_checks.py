"""What calibration data must not be: broken, of another shape, or less than was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.hooks import RemovableHandle

from qaware.errors import QawareError
from qaware.observers import MinMaxObserver

DEFAULT_BATCHES = 32
_SHOWN = 4


def layer_name(observer: str) -> str:
    """The layer, or function, whose activation the observer of this qualified name sees."""
    return re.sub(r"(\.\w+_fake_quantizer)?\.observer$", "", observer)


class Watch:
    """Finds the first batch on which a layer saw NaN or infinity; observers alone would pass it over.

    What a layer sees counts, not what is in the batch: labels may well be NaN where they are missing.
    """

    def __init__(self, observers: Mapping[str, MinMaxObserver]) -> None:
        """
        Args:
            observers: those to watch, by their qualified names.
        """
        self.observers = dict(observers)
        self.complaint: str | None = None
        self._layer: str | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Watch:
        names = {observer: name for name, observer in self.observers.items()}

        def look(observer: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(observer, MinMaxObserver)
            if observer.observing and self._layer is None and not _finite(args[0]):
                self._layer = layer_name(names[observer])

        self._hooks = [observer.register_forward_pre_hook(look) for observer in self.observers.values()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def batch_done(self, number: int, batch: Any) -> None:
        """Blame ``batch``, the one of this number, for what was seen since the last call."""
        if self._layer is not None and self.complaint is None:
            self.complaint = (
                f"calibration: batch {number} (the first is 0) {_broken_part(batch) or self._made_inside()}"
            )
        self._layer = None

    def require_finite(self) -> None:
        """Raise what was found, on every rank: one that went on alone would wait for the others.

        Raises:
            QawareError: names the batch, and the tensor in it or the layer.
        """
        if self._layer is not None and self.complaint is None:
            self.complaint = f"calibration: a batch {self._made_inside()}"
        found: list[str | None] = [self.complaint]
        if dist.is_available() and dist.is_initialized():
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, self.complaint)
        if complaints := [text for text in found if text]:
            raise QawareError(complaints[0])

    def _made_inside(self) -> str:
        return (
            f"gives {self._layer} NaN or infinity, from data that is hidden in the batch or from the float "
            "model itself; leave out that batch, or keep the layer float in the recipe"
        )


def _finite(x: Tensor) -> bool:
    return bool(x.detach().isfinite().all())


def _broken_part(batch: Any) -> str | None:
    for path, leaf in tree_flatten_with_path(_plain(batch))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not _finite(leaf):
            count = int((~leaf.isfinite()).sum())
            where = f" at {keystr(path)}" if path else ""
            return (
                f"has NaN or infinity{where} ({count:,} of {leaf.numel():,} values); "
                "repair the data, or leave out that batch"
            )
    return None


def _plain(batch: Any) -> Any:
    """Mappings and objects as dicts, which the tree functions look into."""
    if isinstance(batch, Mapping):
        return dict(batch)
    opaque = not isinstance(batch, (Tensor, list, tuple)) and hasattr(batch, "__dict__")
    return dict(vars(batch)) if opaque else batch


def shapes(batch: Any) -> str:
    """The shapes of the tensors in a batch, e.g. ``(8, 3, 32, 32), (8,)``."""
    leaves = [leaf for _, leaf in tree_flatten_with_path(_plain(batch))[0] if isinstance(leaf, Tensor)]
    shown = ", ".join(str(tuple(leaf.shape)) for leaf in leaves[:_SHOWN])
    return (shown or "no tensors") + (", ..." if len(leaves) > _SHOWN else "")


def step_failed(what: str, number: int, batch: Any, good: Any, error: Exception) -> str:
    """The message for a batch that the model does not take.

    Args:
        what: the code that failed, e.g. ``validation_step``.
        number: of the batch, from 0.
        batch: as the loader gave it.
        good: a batch, or tensors, that the model is known to take; None where there are none yet.
        error: what was raised.
    """
    example = "" if good is None else f", where it took {shapes(good)}"
    said = " ".join(str(error).split()) or type(error).__name__
    return (
        f"calibration: {what} failed on batch {number} (the first is 0), whose tensors have the shapes "
        f"{shapes(batch)}{example} ({said}); give calibration= batches that it takes"
    )


def require_enough(used: int, asked: int | None) -> str | None:
    """Whether there were as many batches as asked for.

    Args:
        used: batches that were observed, by all ranks together.
        asked: what the user set; None for the default, which is a wish.

    Returns:
        A line to show, where the default was not reached.

    Raises:
        QawareError: names both numbers and the way out.
    """
    if asked is not None and used < asked:
        raise QawareError(
            f"calibration_batches: {asked} were asked for and the data has {used}; "
            f"give calibration= more data, or calibration_batches: {used}"
        )
    if used >= DEFAULT_BATCHES or asked is not None:
        return None
    return f"qaware: calibrated on {used} batches, all that there are (the default takes {DEFAULT_BATCHES})"
