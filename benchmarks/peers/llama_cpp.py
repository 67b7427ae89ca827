"""llama.cpp through llama-cpp-python: F32, Q8_0 and Q4_0 files, written with gguf from the float weights.

All matrices are rounded, the embedding and the head too.  The key-value cache is its own, in float16 as by
default; a prefill gives the logits of all its tokens, as everybody else's does.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.contender import LM, Contender, Runtime, Session
from benchmarks.inputs import PREFILL, SIZES, Array, Size, tokens

_TYPES = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


class LlamaCpp(Runtime):
    """``.gguf``."""

    name = "llama.cpp"
    packages = ("llama_cpp", "gguf")
    variants: ClassVar = {LM: ("fp32", "int8", "int4")}

    def build(self, model: str, variant: str, size: str, folder: Path) -> Contender:
        """Write every tensor in the variant's type; vectors stay float32."""
        path = folder / f"{model}-{variant}.gguf"
        _write(path, SIZES[size], _TYPES[variant])
        note = f"gguf, {_TYPES[variant]} for all matrices"
        return Contender(self.name, model, variant, str(path), path.stat().st_size, note=note)

    def open(self, contender: Contender, size: str, threads: int) -> Session:
        """A context of the model's length."""
        import llama_cpp

        return _session(
            _context(llama_cpp, contender.path, SIZES[size].context, threads), llama_cpp, SIZES[size]
        )


def _context(api: Any, path: str, length: int, threads: int) -> Any:
    """By the C functions: the class ``Llama`` wants a vocabulary, and copies all logits."""
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    if not model:
        raise RuntimeError(f"{path}: llama.cpp cannot load it")
    options = api.llama_context_default_params()
    options.n_ctx = options.n_batch = length
    options.n_threads = options.n_threads_batch = threads
    return api.llama_init_from_model(model, options)


def _session(context: Any, api: Any, size: Size) -> Session:
    """Each decode forgets what the one before wrote, and writes there again."""
    ids = [int(i) for i in tokens(size.vocabulary)[0]]

    def run(part: list[int], start: int) -> Array:
        api.llama_memory_seq_rm(api.llama_get_memory(context), 0, start, -1)
        batch = api.llama_batch_init(len(part), 0, 1)
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        code = api.llama_decode(context, batch)
        api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode: code {code}")
        address = ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (1, len(part), size.vocabulary))

    run(ids[:PREFILL], 0)
    return {"prefill": lambda: run(ids[:PREFILL], 0), "decode": lambda: run(ids[PREFILL:], PREFILL)}


def _write(path: Path, size: Size, kind: str) -> None:
    import gguf

    from benchmarks.speed_models import language_model

    writer = gguf.GGUFWriter(str(path), "llama")
    _describe(writer, gguf, size)
    asked = gguf.GGMLQuantizationType[kind]
    for name, weight in _tensors(language_model(size), size):
        stored = asked if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        if stored == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, gguf: Any, size: Size) -> None:
    """The architecture; tokens have numbers only."""
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.hidden)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.feedforward)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(size.head_width)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(size.vocabulary)
    writer.add_tokenizer_model("no_vocab")


def _tensors(model: Any, size: Size) -> list[tuple[str, Array]]:
    """Names and order of llama.cpp; it rotates neighbours where transformers rotates halves."""
    found = []
    for name, tensor in model.model.state_dict().items():
        weight = np.ascontiguousarray(tensor.float().numpy())
        for part, heads in (("q_proj", size.heads), ("k_proj", size.kv_heads)):
            if part in name:
                halves = weight.reshape(heads, 2, size.head_width // 2, -1)
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        found.append((_name(name), weight))
    return found


def _name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in whole:
        return f"{whole[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"
