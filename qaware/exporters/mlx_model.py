"""Which language models mlx_lm knows, and its ``config.json``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError

CACHE_LENGTH = "qaware_cache_length"
_READ_AS = {"mistral": "llama"}
"""Models that mlx_lm reads as another."""
_SEES_ALL = ("gemma2", "mistral", "phi3", "qwen2", "qwen3")
"""Models whose layers may see a window, which mlx_lm 0.32 leaves out."""


def find_model(module: Any) -> tuple[str, Any]:
    """The model of `transformers` in ``module``: its prefix there, and itself.

    Raises:
        QawareError: there is none, or mlx_lm does not know it.
    """
    candidates = [("", module), ("model.", getattr(module, "model", None))]
    found = [(prefix, part) for prefix, part in candidates if _is_language_model(part)]
    kind = found[0][1].config.model_type if found else None
    if kind is None or not _is_known(kind):
        what = f"model_type {kind!r}" if kind else type(module).__name__
        raise QawareError(
            f"mlx: {what} is no language model of `transformers` that mlx_lm has, as llama, mistral and "
            "qwen3; use another runtime, e.g. onnxruntime"
        )
    return found[0]


def _is_language_model(part: Any) -> bool:
    has_kind = getattr(getattr(part, "config", None), "model_type", None) is not None
    return has_kind and getattr(part, "get_output_embeddings", lambda: None)() is not None


def _is_known(kind: str) -> bool:
    # Looked up without an import: that of mlx_lm lowers the process's limit of open files.
    spec = importlib.util.find_spec("mlx_lm")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any((Path(folder) / "models" / f"{_READ_AS.get(kind, kind)}.py").is_file() for folder in folders)


def require_view(config: Any, longest: int) -> None:
    """Refuse a model whose layers see less of a text than on MLX.

    Args:
        config: of the model.
        longest: tokens of the longest input.

    Raises:
        QawareError: names the window.
    """
    kind, window = config.model_type, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if kind in _SEES_ALL and window is not None and window < longest and "sliding_attention" in kinds:
        raise QawareError(
            f"mlx: sliding_window: layers of {kind!r} see {window} of {longest} tokens, and those of mlx_lm "
            "all; export shorter inputs, or use another runtime, e.g. onnxruntime"
        )


def ends(model: Any) -> tuple[str, str]:
    """The names of the embedding and of the head."""
    names = {id(part): name for name, part in model.named_modules()}
    return names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]


def is_tied(quantized: QuantizedModel, prefix: str, model: Any) -> bool:
    """Whether embedding and head are the same numbers."""
    embedding, head = (quantized.weights.get(prefix + name) for name in ends(model))
    if embedding is not None and head is not None:
        return embedding.data.data_ptr() == head.data.data_ptr()
    same: bool = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return embedding is None and head is None and same


def configuration(model: Any, tied: bool) -> dict[str, Any]:
    """What ``config.json`` says about the model itself.

    Raises:
        QawareError: its layers rotate by several rules.
    """
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in ("quantization_config", "transformers_version"):
        plain.pop(key, None)
    if "full_attention" in (kinds := config.get("layer_types") or []):
        plain["sliding_window_pattern"] = kinds.index("full_attention") + 1
    return {**plain, **_rotation(config.get("rope_parameters") or {}), "tie_word_embeddings": tied}


def _rotation(rope: dict[str, Any]) -> dict[str, Any]:
    """The rule by which positions rotate, under the names that configurations had before."""
    whole, window = rope, None
    if set(rope) == {"full_attention", "sliding_attention"}:
        whole, window = rope["full_attention"], rope["sliding_attention"]
    if any(isinstance(value, dict) for value in whole.values()) or _is_scaled(window or {}):
        raise QawareError(
            f"mlx: rope_parameters has rules for {', '.join(rope)} that mlx_lm has no names for; use another "
            "runtime, e.g. onnxruntime"
        )
    named: dict[str, Any] = {
        key: whole[key] for key in ("rope_theta", "partial_rotary_factor") if key in whole
    }
    if window is not None:
        named["rope_local_base_freq"] = window["rope_theta"]
    return {**named, "rope_scaling": whole} if _is_scaled(whole) else named


def _is_scaled(rope: dict[str, Any]) -> bool:
    kind: str = rope.get("rope_type", "default")
    return kind != "default"


def restore_rotation(module: Any) -> None:
    """Compute the frequencies of a model's rotations anew, in place: MLX has its own, in float32, and a model
    in half precision rounded them."""
    for part in module.modules():
        if type(part).__name__.endswith("RotaryEmbedding") and hasattr(part, "config"):
            for name, frequencies in type(part)(part.config).named_buffers():
                setattr(part, name, frequencies)
