"""What keys and values a model of `transformers` keeps, found by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qaware.errors import QawareError

_TOKENS = 2


class Recorder:
    """A cache that notes what each layer gives to it."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def positions(self, count: int) -> Tensor:
        """Those of the step."""
        return torch.arange(count)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what came."""
        self.shapes[layer] = tuple(keys.shape), tuple(values.shape)
        return keys, values


def recorded_shapes(module: Any) -> list[tuple[int, int]]:
    """``(heads, dim)`` of the keys and values of each layer of a module with ``step``.

    Raises:
        QawareError: the model asks more of its cache than keys and values, or does not use it.
    """
    recorder, device = Recorder(), next((p.device for p in module.parameters()), torch.device("cpu"))
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device=device)
    training = module.training
    try:
        with torch.no_grad():
            module.eval().step(ids, torch.arange(_TOKENS, device=device), recorder)
    except (AttributeError, TypeError, IndexError, ValueError) as error:
        kind = module.model.config.model_type
        raise QawareError(
            f"model: {kind!r} keeps more than keys and values ({type(error).__name__}: {error})"
        ) from error
    finally:
        module.train(training)
    found = [shape for layer in sorted(recorder.shapes) for shape in recorder.shapes[layer]]
    if not found or sorted(recorder.shapes) != list(range(len(recorder.shapes))):
        raise QawareError(f"model: only layers {sorted(recorder.shapes)} keep keys and values")
    if any(len(shape) != 4 or shape[0] != 1 or shape[2] != _TOKENS for shape in found):
        raise QawareError(f"model: keys and values have shapes {found}, not (1, heads, tokens, dim)")
    return [(shape[1], shape[3]) for shape in found]
