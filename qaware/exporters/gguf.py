"""GGUF files for llama.cpp: Q4_0, Q8_0 and F16 weights of llama-like language models, tokenizer included."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.base import Runner, Tolerance, Written
from qaware.exporters.generation import cache_of, why_no_cache
from qaware.exporters.gguf_names import KINDS, find_model, is_known
from qaware.exporters.gguf_write import BLOCK, Q4_BITS, write_gguf
from qaware.exporters.precision import in_float32, to_float32
from qaware.exporters.signature import Signature
from qaware.exporters.tokenizer_files import TextExporter
from qaware.plan import Decision, Plan


class GGUFExporter(TextExporter):
    """A ``.gguf`` that llama.cpp and what is built on it load; only language models have a place in one."""

    name = "gguf"
    suffix = ".gguf"
    packages = ("gguf", "llama_cpp")
    extra = "gguf"
    tolerance = Tolerance(
        relative=0.03,
        kl=2e-3,
        reason="llama.cpp rounds what enters a layer to int8 for each 32 values of a token, float16 weights "
        "meet float16 activations",
    )

    def __init__(self, *, cache_length: int | None = None) -> None:
        """
        Args:
            cache_length: tokens of the key-value cache with which the file is scored; default the model's
                context, at most 1024. The file is bound to none.
        """
        self.cache_length = cache_length

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """Float layers alone are multiplied in float32."""
        if plan.quantized:
            return self.tolerance
        return Tolerance(1e-5, 1e-8, "float32 sums in another order")

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """How activations enter, and how bits are stored."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        chosen = ["scored with keys and values in float32; llama.cpp keeps them in float16 unless told"]
        if any(not s.is_float for s in schemes):
            chosen.append("llama.cpp rounds what enters a layer to int8, for each 32 values of a token")
        if any(s.stored_bits < Q4_BITS for s in schemes):
            chosen.append("up to 4 bits take 4.5 bits a weight (Q4_0)")
        if any(Q4_BITS < s.stored_bits <= 8 for s in schemes):
            chosen.append("5 to 8 bits take 8.5 bits a weight (Q8_0)")
        return tuple(chosen)

    def refuse(self, decision: Decision) -> str | None:
        """Only the layers of llama-like models have a place, in blocks of 32 with a float16 scale."""
        scheme = decision.scheme
        if scheme is None:
            return None
        if not is_known(decision.module):
            return f"a .gguf has no place for it, only for the layers of {', '.join(KINDS)}; leave gguf out"
        if scheme.is_float:
            return None
        if scheme.is_static:
            return "llama.cpp has no static activations; use int8-dynamic or none"
        if not scheme.symmetric:
            return f"{scheme.label} has zero points, which Q4_0 and Q8_0 have not; use symmetric: true"
        if decision.width % BLOCK or scheme.group_size % BLOCK:
            return (
                f"{scheme.label} on {decision.width} input weights does not fill blocks of {BLOCK}; use "
                f"groups and widths that are multiples of {BLOCK}"
            )
        if scheme.scale_dtype == "float32":
            return (
                f"{scheme.label} has float32 scales, GGUF's blocks float16; use scale_dtype: bfloat16 or "
                "float16"
            )
        return None

    def unpacks(self, decision: Decision) -> str | None:
        """Nothing: ggml multiplies Q4_0, Q8_0 and F16 as they are."""
        return None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Write the tensors under llama.cpp's names.

        Raises:
            QawareError: llama.cpp does not know the model, or it sees a window.
        """
        find_model(quantized.module)
        cache = cache_of(quantized.module, signature, self.cache_length)
        if cache is None:
            raise QawareError(f"gguf: {why_no_cache(quantized.module, signature, self.cache_length)}")
        to_float32(quantized)
        return Written(tuple(write_gguf(quantized, cache, self.tokenizer, path)))

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """The converted model; of one in half precision the same integers in float32."""
        return in_float32(quantized)

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load a file.

        Raises:
            QawareError: llama.cpp cannot read it.
        """
        from qaware.exporters.gguf_runner import open_gguf

        return open_gguf(path, signature)
