"""A GGUF file: integers in the blocks of llama.cpp, the sizes of the model, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.errors import QawareError
from qaware.exporters.generation import CacheSpec
from qaware.exporters.gguf_names import KINDS, find_model, gguf_name, head_dim, rows_of
from qaware.exporters.gguf_tokenizer import add_tokenizer

BLOCK = 32
"""Weights that share one float16 scale, in Q4_0 as in Q8_0."""
Q4_BITS = 4
CACHE_LENGTH = "qaware.cache_length"


def write_gguf(quantized: QuantizedModel, cache: CacheSpec, tokenizer: Path | None, path: Path) -> list[str]:
    """Write ``path``; return what is to be told about the tokenizer.

    Raises:
        QawareError: llama.cpp does not know the model, or a scale does not fit float16.
    """
    import gguf

    prefix, model = find_model(quantized.module)
    writer = gguf.GGUFWriter(str(path), KINDS[model.config.model_type].name)
    try:
        _describe(writer, model.config)
        writer.add_uint32(CACHE_LENGTH, cache.length)
        notes = add_tokenizer(writer, tokenizer, model.config)
        _add_tensors(writer, quantized, prefix, model)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return notes


def _describe(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)


def _add_tensors(writer: Any, quantized: QuantizedModel, prefix: str, model: Any) -> None:
    tied = _is_tied(quantized, prefix, model)
    for key, tensor in model.state_dict(keep_vars=True).items():
        module, _, kind = key.rpartition(".")
        name = gguf_name(module)
        if name is None or (kind == "bias" and not KINDS[model.config.model_type].biases):
            raise QawareError(
                f"{prefix}{key}: llama.cpp has no place for it; merge or remove it, or use onnxruntime"
            )
        if name == "output" and tied:  # llama.cpp reads the embedding then
            continue
        rows = rows_of(name, model.config)
        weight = quantized.weights.get(prefix + module) if kind == "weight" else None
        if weight is None:
            floats = tensor.detach().float()
            writer.add_tensor(
                f"{name}.{kind}", (floats if rows is None else floats[rows]).contiguous().numpy()
            )
        else:
            data, stored = blocks(prefix + module, weight, rows)
            writer.add_tensor(f"{name}.{kind}", data, raw_dtype=stored)


def _is_tied(quantized: QuantizedModel, prefix: str, model: Any) -> bool:
    names = [prefix + "model.embed_tokens", prefix + "lm_head"]
    pair = [quantized.weights.get(name) for name in names]
    if pair[0] is not None and pair[1] is not None:
        return pair[0].data.data_ptr() == pair[1].data.data_ptr()
    return pair == [None, None] and model.lm_head.weight is model.model.embed_tokens.weight


def blocks(name: str, weight: QuantizedWeight, rows: Tensor | None) -> tuple[np.ndarray[Any, Any], Any]:
    """The bytes of one weight, and their type.

    Args:
        name: for errors.
        weight: of any scheme that the exporter accepts.
        rows: in which order; None: as they are.

    Raises:
        QawareError: a scale is not exact in float16.
    """
    from gguf import GGMLQuantizationType as Types

    data = weight.data if rows is None else weight.data[rows]
    if weight.scale is None:
        return data.contiguous().numpy(), Types.F16
    scale = _scales(name, weight) if rows is None else _scales(name, weight)[rows]
    integers = data.numpy().reshape(*scale.shape, BLOCK)
    heads = scale[..., None].view(np.uint8)
    if weight.scheme.stored_bits > Q4_BITS:
        return _joined(heads, integers.view(np.uint8)), Types.Q8_0
    # The first half of a block is in the lower bits, the second in the higher ones.
    codes = (integers.astype(np.int16) + 8).astype(np.uint8)
    return _joined(heads, codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)), Types.Q4_0


def _joined(heads: np.ndarray[Any, Any], body: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([heads, body], -1).reshape(len(body), -1)


def _scales(name: str, weight: QuantizedWeight) -> np.ndarray[Any, Any]:
    """float16 (rows, blocks of 32)."""
    scale = weight.scale
    assert scale is not None
    repeats = weight.data.shape[1] // BLOCK // scale.shape[1]
    # Of a row of zeros any scale is exact.
    used = weight.data.unflatten(1, (scale.shape[1], -1)).ne(0).any(-1)
    lost = (scale.half().float() != scale) & used
    if bool(lost.any()):
        raise QawareError(
            f"{name}: scale {float(scale[lost][0]):.3g} is not exact in the float16 of GGUF's blocks "
            f"({int(lost.sum())} of {scale.numel()}); train with scale_dtype: float16"
        )
    stored: np.ndarray[Any, Any] = scale.half().repeat_interleave(repeats, 1).contiguous().numpy()
    return stored
