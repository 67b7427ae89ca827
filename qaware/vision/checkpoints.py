"""Weights of a network from a file, strictly: every key must fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaware.errors import QawareError

_WRAPPERS = ("module.", "network.")
"""What DataParallel, DDP and :class:`qaware.vision.ImageClassifier` put before a network's own keys."""
_NAMED = 5
"""Keys that an error names."""


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a state dict, or a checkpoint that has one under ``state_dict``, without running its pickle.

    Args:
        network: whose weights are replaced.
        path: a file of ``torch.save``.

    Raises:
        QawareError: no such file, another content, keys that are missing or unexpected, or other shapes.
    """
    state = _unwrap(_read(Path(path).expanduser()))
    own = network.state_dict()
    # torch before 0.4.1 did not count batches, and load_state_dict then begins at zero.
    counted = {key for key in own if not key.endswith("num_batches_tracked")}
    problems = [
        _listed("missing", counted - state.keys()),
        _listed("unexpected", state.keys() - own.keys()),
        _listed(
            "of another shape",
            {
                f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
                for key in own.keys() & state.keys()
                if own[key].shape != state[key].shape
            },
        ),
    ]
    if any(problems):
        raise QawareError(
            f"checkpoint: {str(path)!r} does not fit {type(network).__name__}: "
            f"{'; '.join(filter(None, problems))}; give the network that it was trained as"
        )
    network.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise QawareError(f"checkpoint: {path} cannot be read ({error.strerror}); check the path") from error
    except Exception as error:  # whatever unpickling a foreign file raises
        raise QawareError(
            f"checkpoint: {path} is not a file of weights that is safe to load "
            f"({' '.join(str(error).split())[:120]}); save a plain state_dict with torch.save"
        ) from error
    state = data.get("state_dict", data) if isinstance(data, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise QawareError(f"checkpoint: {path} holds no state_dict of tensors; save one with torch.save")
    return dict(state)


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _listed(what: str, keys: set[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"{what}: {', '.join(sorted(keys)[:_NAMED])}{more}"
