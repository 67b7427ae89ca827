"""The folder that mlx_lm loads: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.exporters.generation import CacheSpec
from qaware.exporters.mlx_model import CACHE_LENGTH, configuration, ends, find_model, is_tied
from qaware.exporters.mlx_weights import bits_of, extra_bytes, group_of, stored

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_folder(quantized: QuantizedModel, cache: CacheSpec | None, path: Path) -> list[str]:
    """Write both files into the new folder ``path``; return notes for the report.

    Raises:
        QawareError: mlx_lm does not know the model.
    """
    prefix, model = find_model(quantized.module)
    tied = is_tied(quantized, prefix, model)
    weights = {name.removeprefix(prefix): weight for name, weight in quantized.weights.items()}
    head = ends(model)[1] if tied else None  # mlx_lm reads the embedding then
    layers = {name: w for name, w in weights.items() if w.scale is not None and name != head}
    config = configuration(model, tied)
    if layers:
        config["quantization"] = _quantization(layers)
    if cache is not None:
        config[CACHE_LENGTH] = cache.length
    tensors, extra = _integers(model, layers)
    path.mkdir()
    save_file({**_floats(model, weights, head), **tensors}, path / WEIGHTS, {"format": "mlx"})
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [f"scales and biases are repeated for MLX's smaller groups: {extra:,} bytes"] if extra else []


def _floats(model: Any, weights: dict[str, QuantizedWeight], head: str | None) -> dict[str, Tensor]:
    """Tensors without integers, by mlx_lm's names, but that of ``head``; float32, as MLX computes on in the
    precision that it finds, except for the float16 weights of the plan."""
    saved = {}
    for key, value in model.state_dict().items():
        name, _, kind = key.rpartition(".")
        weight = weights.get(name) if kind == "weight" else None
        if (kind == "weight" and name == head) or (weight is not None and weight.scale is not None):
            continue
        kept = weight is not None or not value.is_floating_point()
        # A copy of its own: safetensors refuses tensors that share memory.
        saved[key] = (value if kept else value.float()).clone().contiguous()
    return saved


def _integers(model: Any, layers: dict[str, QuantizedWeight]) -> tuple[dict[str, Tensor], int]:
    """Tensors of integers, scales and biases, by mlx_lm's names, and the ``extra_bytes`` of all."""
    saved: dict[str, Tensor] = {}
    extra = 0
    for name, weight in layers.items():
        parts = stored(weight, isinstance(model.get_submodule(name), nn.Embedding))
        saved |= {f"{name}.{part}": values for part, values in parts.items()}
        extra += extra_bytes(weight, parts)
    return saved, extra


def _quantization(layers: dict[str, QuantizedWeight]) -> dict[str, Any]:
    """The commonest form for all, and that of each layer."""
    found = {name: (bits_of(w.scheme), group_of(w.scheme, w.data.shape[1])) for name, w in layers.items()}
    bits, group = Counter(found.values()).most_common(1)[0][0]
    forms = {name: {"group_size": group, "bits": bits} for name, (bits, group) in found.items()}
    return {"group_size": group, "bits": bits, "mode": "affine", **forms}
