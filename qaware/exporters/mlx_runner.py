"""A folder on MLX, by mlx_lm's model and its key-value cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.base import Runner, first_line
from qaware.exporters.generation import CachedRunner
from qaware.exporters.mlx_model import CACHE_LENGTH
from qaware.exporters.signature import Signature
from qaware.exporters.steps import require_given


def open_folder(path: Path, signature: Signature) -> Runner:
    """Load a folder; it computes in float32, on the device that MLX chooses.

    Raises:
        QawareError: mlx_lm cannot load it.
    """
    model = _Model(path)
    if model.length is None:
        return model.whole
    return CachedRunner(model.length, signature.longest, model)


class _Model:
    """A loaded folder and its cache."""

    def __init__(self, path: Path) -> None:
        self.name, self.held = path.name, 0
        try:
            import mlx.core as mx
            from mlx_lm.models.cache import make_prompt_cache
            from mlx_lm.utils import load_model

            self.mx: Any = mx
            self.model, config = load_model(path)
            self.length: int | None = config.get(CACHE_LENGTH)
            self._empty = lambda: make_prompt_cache(self.model)
            self.cache = self._empty()
        except Exception as error:
            why = " ".join(str(error).split())[:200]  # its second line names the tensors
            raise QawareError(f"{self.name}: mlx_lm cannot load it: {type(error).__name__}: {why}") from error

    def whole(self, *tensors: Tensor) -> Tensor:
        """Logits float32 (B, T, V) of int64 ids (B, T)."""
        return self._logits(tensors[0], None)

    def __call__(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits float32 (1, S, V) of int64 ids (1, S) at ``start``.

        Raises:
            QawareError: the tokens before it were not given.
        """
        require_given(self.name, start, self.held)
        if start == 0:
            self.cache = self._empty()
        for layer in self.cache if start else []:
            layer.trim(self.held - start)
        self.held = start + input_ids.shape[1]
        return self._logits(input_ids, self.cache)

    def _logits(self, input_ids: Tensor, cache: Any) -> Tensor:
        try:
            ids = self.mx.array(input_ids.detach().cpu().numpy().astype(np.int32))
            logits = self.model(ids, cache=cache).astype(self.mx.float32)
            return torch.from_numpy(np.array(logits))
        except Exception as error:
            raise QawareError(f"{self.name}: MLX cannot run it: {first_line(error)}") from error
