"""ONNX Runtime GenAI: a folder of an ONNX file with key-value cache, its settings and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.base import Runner, Written
from qaware.exporters.generation import CacheSpec, cache_of, why_no_cache
from qaware.exporters.onnx_exporter import OnnxExporter
from qaware.exporters.signature import Signature
from qaware.exporters.tokenizer_files import NO_TOKENIZER, TextExporter
from qaware.plan import Decision


class GenAIExporter(TextExporter, OnnxExporter):
    """A folder of ``model.onnx``, ``genai_config.json`` and the tokenizer; only language models have a place
    in one. The layers are those of ONNX Runtime."""

    name = "onnxruntime-genai"
    suffix = ".genai"
    packages = ("onnxruntime_genai", "onnx", "onnxscript")
    extra = "genai"

    def refuse(self, decision: Decision) -> str | None:
        """Only layers of language models have a place."""
        if decision.scheme is not None and decision.type not in ("Linear", "Embedding"):
            return f"GenAI generates from language models, which have no {decision.type}; use onnxruntime"
        return super().refuse(decision)

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Write the graph as for ONNX Runtime, and what GenAI wants to know about it.

        Raises:
            QawareError: the model has no key-value cache, or one whose layers differ.
        """
        from qaware.exporters.genai_files import MODEL, write_settings

        cache = self._cache(quantized, signature)
        with torch.no_grad():
            vocabulary = signature.wrap(quantized.module.cpu())(*example).shape[-1]
        path.mkdir()
        super().write(quantized, example, signature, path / MODEL)
        has_tokenizer = self.copy_tokenizer(path)
        write_settings(path, signature.inputs[0].name, cache, vocabulary)
        return Written() if has_tokenizer else Written((f"{NO_TOKENIZER}: give GenAI token ids",))

    def _cache(self, quantized: QuantizedModel, signature: Signature) -> CacheSpec:
        cache = cache_of(quantized.module, signature, self.cache_length)
        if cache is None:
            why = why_no_cache(quantized.module, signature, self.cache_length)
            raise QawareError(f"onnxruntime-genai: {why}; use onnxruntime, which needs no cache")
        if len(set(cache.shapes)) > 1:
            raise QawareError(
                f"onnxruntime-genai: keys and values of its layers are {sorted(set(cache.shapes))} (heads, "
                "features), GenAI has one size for all; use onnxruntime"
            )
        return cache

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load a folder.

        Raises:
            QawareError: GenAI cannot load it.
        """
        from qaware.exporters.genai_runner import open_folder

        return open_folder(path, signature)
