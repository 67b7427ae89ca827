"""MLX, for Apple's computers: a folder that mlx_lm loads, integers in affine groups, tokenizer included."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.exporters.base import Runner, Tolerance, Written
from qaware.exporters.generation import cache_of
from qaware.exporters.mlx_files import write_folder
from qaware.exporters.mlx_model import find_model, require_view, restore_rotation
from qaware.exporters.mlx_weights import GROUPS, bits_of, group_of
from qaware.exporters.packed_layers import PackedLinear, pack_layers
from qaware.exporters.precision import to_float32
from qaware.exporters.signature import Signature
from qaware.exporters.tokenizer_files import NO_TOKENIZER, TextExporter
from qaware.plan import Decision, Plan


class MLXExporter(TextExporter):
    """A folder of ``config.json``, ``model.safetensors`` and the tokenizer, for ``mlx_lm.load``."""

    name = "mlx"
    suffix = ".mlx"
    packages = ("mlx", "mlx_lm")
    extra = "mlx"
    tolerance = Tolerance(relative=1e-5, kl=1e-8, reason="float32 sums in another order")

    def __init__(self, *, cache_length: int | None = None) -> None:
        """
        Args:
            cache_length: tokens of the key-value cache with which the folder is scored; default the model's
                context, at most 1024. The folder is bound to none.
        """
        self.cache_length = cache_length

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """Looser with float16 embeddings: where a model multiplies them, MLX does so in float16."""
        tables = [d.scheme for d in plan.quantized.values() if d.scheme and d.type == "Embedding"]
        if not any(scheme.is_float for scheme in tables):
            return self.tolerance
        return Tolerance(1e-3, 1e-6, "embeddings that the model multiplies are rounded to float16: 2e-4")

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """How activations enter, and how bits are stored."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme and not d.scheme.is_float]
        chosen = []
        if any(s.activation == "int8-dynamic" for s in schemes):
            chosen.append("activations in float32: MLX rounds none to int8")
        wide = {f"int{s.stored_bits} as {bits_of(s)} bits" for s in schemes if s.stored_bits != bits_of(s)}
        if wide:
            chosen.append(f"weights take a width that MLX has: {', '.join(sorted(wide))}")
        if schemes:
            chosen.append("each group has a bias beside its scale")
        return tuple(chosen)

    def refuse(self, decision: Decision) -> str | None:
        """Only linear layers and embeddings, in groups of 32, 64 or 128."""
        scheme = decision.scheme
        if scheme is None:
            return None
        if decision.type not in ("Linear", "Embedding"):
            return f"mlx_lm's language models have no {decision.type}; leave it float (scheme: null)"
        if scheme.is_static:
            return "MLX multiplies floats and has no static activations; use int8-dynamic or none"
        if not scheme.is_float and group_of(scheme, decision.width) is None:
            legal = ", ".join(map(str, sorted(GROUPS)))
            return (
                f"{scheme.label} on {decision.width} input weights does not fill MLX's groups of {legal}; "
                f"use groups and widths that are multiples of {GROUPS[-1]}"
            )
        return None

    def unpacks(self, decision: Decision) -> str | None:
        """Float16 weights; packed integers are expanded inside the product."""
        scheme = decision.scheme
        return "float16 weights are widened for each product" if scheme and scheme.is_float else None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Write the tensors under mlx_lm's names, which are those of `transformers`.

        Raises:
            QawareError: mlx_lm does not know the model, or lets its layers see more.
        """
        require_view(find_model(quantized.module)[1].config, signature.longest)
        cache = cache_of(quantized.module, signature, self.cache_length)
        notes = write_folder(quantized, cache, path)
        if not self.copy_tokenizer(path):
            notes.append(f"{NO_TOKENIZER}: mlx_lm.load wants one, mlx_lm.utils.load_model does not")
        return Written(tuple(notes))

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """The converted model in float32, but without rounding what enters a layer."""
        work = copy.deepcopy(quantized)
        to_float32(work)
        restore_rotation(work.module)
        pack_layers(work)
        for part in work.module.modules():
            if isinstance(part, PackedLinear):
                part.activation = "none"
        return work.module

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load a folder.

        Raises:
            QawareError: mlx_lm cannot load it.
        """
        from qaware.exporters.mlx_runner import open_folder

        return open_folder(path, signature)
