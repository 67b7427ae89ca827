"""Packed integers (MatMulNBits) or int8 operators (QDQ), for ONNX Runtime and what is built on it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.base import Exporter, Tolerance, Written, one_step
from qaware.exporters.generation import cache_of
from qaware.exporters.onnx_layers import INT8_PRODUCTS, bits_of, fits, level_of, use_blocks
from qaware.exporters.onnx_program import write_onnx
from qaware.exporters.packed_layers import pack_layers
from qaware.exporters.precision import in_float32, to_float32
from qaware.exporters.signature import Signature
from qaware.exporters.static_limits import refuse_static
from qaware.plan import Decision, Plan

LEVELS = (0, 1, 2, 3, 4)


class OnnxExporter(Exporter):
    """Writes the operators of ONNX Runtime, which no other reader of ONNX need have."""

    tolerance = Tolerance(
        relative=0.03,
        kl=2e-3,
        reason=(
            "activations are rounded to int8 for each block of a token, not for the whole token: 0.007 in a "
            "small model; static ones may move to the next step"
        ),
    )

    def __init__(self, *, accuracy_level: int | None = None, cache_length: int | None = None) -> None:
        """
        Args:
            accuracy_level: of MatMulNBits, as ONNX Runtime numbers them: 0 or 1, activations stay float32; 4,
                they are rounded to int8 for each block, which is faster; 2 and 3, float16 and bfloat16, where
                a kernel has them. Default 4 for layers with int8-dynamic activations, 0 for others.
            cache_length: of a language model, tokens that its key-value cache holds; default the model's
                context, at most 1024. Only those that are used take memory.

        Raises:
            QawareError: another level.
        """
        if accuracy_level is not None and (type(accuracy_level) is not int or accuracy_level not in LEVELS):
            raise QawareError(f"accuracy_level: {accuracy_level!r} is not one of 0, 1, 2, 3, 4")
        self.accuracy_level, self.cache_length = accuracy_level, cache_length

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """Without a rounding of activations there is none to flip; a static one flips by a step."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        if any(s.is_static for s in schemes):
            return one_step(self.tolerance) if plan.layout is not None else self.tolerance
        if any(s.activation == "int8-dynamic" for s in schemes) or self.accuracy_level not in (None, 0, 1):
            return self.tolerance
        return Tolerance(1e-5, 1e-8, "float32 sums in another order: 3e-7 on one layer")

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """What is stored wider than planned, and which products are of floats."""
        decisions = [d for d in plan.quantized.values() if d.scheme]
        blocks = [d for d in decisions if fits(d)]
        chosen = []
        if any(level_of(d, self.accuracy_level) == INT8_PRODUCTS for d in blocks if d.type == "Linear"):
            chosen.append(
                "accuracy_level 4: activations are rounded to int8 for each block of a token, symmetrically"
            )
        wide = {f"int{d.scheme.bits} as {bits_of(d.scheme)} bits" for d in blocks if d.scheme}
        wide -= {f"int{bits} as {bits} bits" for bits in (2, 4, 8)}
        if wide:
            chosen.append(f"weights take the width of their kernels: {', '.join(sorted(wide))}")
        if any(d.scheme and d.scheme.is_static and d.scheme.bits < 8 for d in decisions):
            chosen.append("weights of layers with static activations take 8 bits each, whatever their width")
        if any(d.scheme and not d.scheme.is_static and d not in blocks for d in decisions):
            chosen.append(
                "float16 weights, weight-only convolutions and groups of less than 16 are float32 once loaded"
            )
        return tuple(chosen)

    def refuse(self, decision: Decision) -> str | None:
        """Only layers with static activations have limits, those of the int8 operators."""
        scheme = decision.scheme
        return None if scheme is None or not scheme.is_static else refuse_static(scheme, "ONNX Runtime")

    def unpacks(self, decision: Decision) -> str | None:
        """Layers that neither MatMulNBits nor the int8 operators are for."""
        scheme = decision.scheme
        if scheme is None or scheme.is_static or decision.type == "Embedding" or fits(decision):
            return None
        return f"{scheme.label} of {decision.type} is float32 once loaded"

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Give the layers their operators, trace with dynamic axes, write the file."""
        cache = cache_of(quantized.module, signature, self.cache_length)
        to_float32(quantized)
        use_blocks(quantized, self.accuracy_level)
        pack_layers(quantized)
        write_onnx(quantized.module, example, signature, cache, path)
        return Written()

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """The converted model; of one in half precision the same integers in float32."""
        return in_float32(quantized)
