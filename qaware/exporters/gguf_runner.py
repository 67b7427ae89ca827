"""A GGUF file on llama.cpp, by its C functions: whole texts, and steps with its own key-value cache.

The class ``Llama`` of llama-cpp-python wants a vocabulary, and copies all logits more than once.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.generation import CachedRunner
from qaware.exporters.gguf_write import CACHE_LENGTH
from qaware.exporters.signature import Signature
from qaware.exporters.steps import require_given


def open_gguf(path: Path, signature: Signature) -> CachedRunner:
    """Load a file; keys and values are kept in float32, and it computes with as many threads as torch.

    Raises:
        QawareError: llama.cpp cannot read it, or it is not qaware's.
    """
    model = _Model(path, signature.longest)
    return CachedRunner(model.length, signature.longest, model)


@functools.cache
def _start() -> Any:
    """Silence llama.cpp, in the whole process; kept, because it calls what is returned from now on."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return silence


class _Model:
    """A loaded file and its cache."""

    def __init__(self, path: Path, longest: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.path, self.held = path, 0
        _start()
        model = None
        if path.is_file():
            options = self.api.llama_model_default_params()
            model = self.api.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise QawareError(f"{path.name}: llama.cpp cannot load it; export it again")
        self.model = model
        weakref.finalize(self, self.api.llama_model_free, model)
        self.length = self._cache_length()
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model))
        self.context = self.api.llama_init_from_model(model, self._options(longest))
        if not self.context:
            raise QawareError(f"{path.name}: llama.cpp has no memory for a cache of {self.length} tokens")
        # Those made last go first, so the context before its model.
        weakref.finalize(self, self.api.llama_free, self.context)

    def _cache_length(self) -> int:
        text = ctypes.create_string_buffer(16)
        if self.api.llama_model_meta_val_str(self.model, CACHE_LENGTH.encode(), text, len(text)) < 0:
            raise QawareError(
                f"{self.path.name}: has no {CACHE_LENGTH}; only files that qaware wrote can be opened"
            )
        return int(text.value)

    def _options(self, longest: int) -> Any:
        options = self.api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = self.length, longest, longest
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.type_k = options.type_v = self.api.GGML_TYPE_F32
        options.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return options

    def __call__(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits float32 (1, S, V) of int64 ids (1, S) at ``start``."""
        require_given(self.path.name, start, self.held)
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, start, -1)
        ids = input_ids[0].tolist()
        self._decode(ids, start)
        self.held = start + len(ids)
        address = ctypes.cast(self.api.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(address, (1, len(ids), self.vocabulary))
        return torch.from_numpy(logits.copy())  # the array is llama.cpp's

    def _decode(self, ids: list[int], start: int) -> None:
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, start + index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, 1
        code = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if code:
            self.held = 0
            raise QawareError(f"{self.path.name}: llama.cpp cannot run it (llama_decode gave {code})")
