"""OpenVINO: its IR, two files in a folder, with integers of 4 or 8 bits as compressed constants."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.exporters.base import Exporter, Runner, Tolerance, Written
from qaware.exporters.generation import cache_of
from qaware.exporters.openvino_layers import stored_bits, use_plain
from qaware.exporters.precision import to_float32
from qaware.exporters.signature import Signature
from qaware.exporters.static_limits import refuse_static
from qaware.matching import CONVOLUTIONS
from qaware.plan import Decision, Plan


class OpenVINOExporter(Exporter):
    """A folder with ``model.xml`` and ``model.bin``, which an app reads as they are."""

    name = "openvino"
    suffix = ".openvino"
    packages = ("openvino", "onnx", "onnxscript")
    extra = "openvino"
    tolerance = Tolerance(relative=1e-5, kl=1e-8, reason="float32 sums in another order: 3e-7 on one layer")

    def __init__(self, *, cache_length: int | None = None) -> None:
        """
        Args:
            cache_length: of a language model, tokens that its key-value cache holds; default the model's
                context, at most 1024. Only those that are used take memory.
        """
        self.cache_length = cache_length

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """Two steps of the output where it is an integer."""
        if not any(d.scheme and d.scheme.is_static for d in plan.quantized.values()):
            return self.tolerance
        reason = (
            "OpenVINO merges scales of neighbouring operators, so a value near an edge moves by one: 0.003"
        )
        return Tolerance(0.03, 2e-3, reason, steps=2.0 if plan.layout is not None else None)

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """With which settings it is scored, and how bits are stored."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        others = [s for s in schemes if not s.is_static]
        chosen = [
            "scored with INFERENCE_PRECISION_HINT f32 and DYNAMIC_QUANTIZATION_GROUP_SIZE 0; OpenVINO's own "
            "choice on a CPU that can is bfloat16 and int8 activations in groups of 32, faster and less exact"
        ]
        if any(s.activation == "int8-dynamic" for s in others):
            chosen.append("activations in float32 for the score: OpenVINO chooses itself where they are int8")
        wide = {
            f"int{s.bits} as {bits} bits"
            for d in plan.quantized.values()
            if (s := d.scheme)
            and not (s.is_static or s.is_float)
            and (bits := stored_bits(s, d.width)) != s.bits
        }
        if wide:
            chosen.append(f"weights take a width that OpenVINO has: {', '.join(sorted(wide))}")
        if any(s.is_static and s.bits < 8 for s in schemes):
            chosen.append("weights of layers with static activations take 8 bits each, whatever their width")
        return tuple(chosen)

    def refuse(self, decision: Decision) -> str | None:
        """Only layers with static activations have limits, those of the int8 operators."""
        scheme = decision.scheme
        return None if scheme is None or not scheme.is_static else refuse_static(scheme, "OpenVINO")

    def unpacks(self, decision: Decision) -> str | None:
        """Float16 weights, and convolutions without integer activations; other constants stay compressed
        until their product."""
        scheme = decision.scheme
        if scheme is None or scheme.is_static:
            return None
        floats = scheme.is_float or decision.type in CONVOLUTIONS
        return f"{scheme.label} of {decision.type} is float32 once loaded" if floats else None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Trace to ONNX, convert, put the integers of 4 bits in two to a byte, and save."""
        from qaware.exporters.openvino_files import write_folder

        cache = cache_of(quantized.module, signature, self.cache_length)
        to_float32(quantized)
        write_folder(quantized.module, use_plain(quantized), example, signature, cache, path)
        return Written()

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """The converted model, but without rounding what enters a layer that OpenVINO computes in float32."""
        work = copy.deepcopy(quantized)
        to_float32(work)
        use_plain(work)
        return work.module

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load a folder.

        Raises:
            QawareError: OpenVINO cannot read it or its inputs are not those of ``signature``.
        """
        from qaware.exporters.openvino_files import open_folder

        return open_folder(path, signature)
