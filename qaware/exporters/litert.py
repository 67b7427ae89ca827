"""LiteRT (formerly TensorFlow Lite): one ``.tflite`` file, on CPUs by XNNPACK."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.exporters.base import Exporter, Runner, Tolerance, Written, in_evaluation
from qaware.exporters.generation import cache_of
from qaware.exporters.litert_forms import BLOCKS, bits_of, block_of, is_kept
from qaware.exporters.precision import in_float32, to_float32
from qaware.exporters.signature import Signature
from qaware.matching import CONVOLUTIONS
from qaware.plan import Decision, Plan
from qaware.wording import counted

_ON_AN_EDGE = (
    "a float32 product or average near the edge between two integers moves by a step: 0 in small networks, 2 "
    "where averages stay on the grid of what they are of"
)


class LiteRTExporter(Exporter):
    """A file for LiteRT's interpreter, which Android, iOS and the web have as well."""

    name = "litert"
    suffix = ".tflite"
    packages = ("litert_torch", "ai_edge_litert")
    extra = "litert"
    tolerance = Tolerance(
        relative=0.03,
        kl=2e-3,
        reason="an int8 activation near an edge may round to the next step: 0.003 in a small model",
    )

    def __init__(self, *, cache_length: int | None = None) -> None:
        """
        Args:
            cache_length: of a language model, tokens that its key-value cache holds; default the model's
                context, at most 1024. All take memory, and time in every step.
        """
        self.cache_length = cache_length

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """Without a rounding of activations there is none to flip; a static one flips by a step."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        if any(s.is_static for s in schemes):
            steps = None if plan.layout is None else 2.0 if plan.layout.engine == "graph" else 1.0
            return dataclasses.replace(self.tolerance, reason=_ON_AN_EDGE, steps=steps)
        if any(s.activation == "int8-dynamic" for s in schemes):
            return self.tolerance
        return Tolerance(1e-5, 1e-8, "float32 sums in another order: 2e-7 in a small model")

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """What is stored wider than planned, and which products are of floats."""
        decisions = [d for d in plan.quantized.values() if d.scheme]
        chosen = []
        integers = [(d.scheme, d.width) for d in decisions if d.scheme and not d.scheme.is_float]
        widths = [(scheme.bits, bits_of(scheme, width)) for scheme, width in integers]
        wide = {f"int{bits} as {stored} bits" for bits, stored in widths if bits != stored}
        if wide:
            chosen.append(f"weights take the width of their kernels: {', '.join(sorted(wide))}")
        if any(not is_kept(d) and d.scheme and not d.scheme.is_static for d in decisions):
            chosen.append("weights of layers without int8 activations are float32 once loaded")
        return tuple(chosen)

    def refuse(self, decision: Decision) -> str | None:
        """Layers with int8-dynamic activations have the limits of XNNPACK's kernels."""
        scheme = decision.scheme
        if decision.type in CONVOLUTIONS and scheme is not None and scheme.group_size:
            return "LiteRT has the channels of a convolution last, which cuts groups; use group_size: 0"
        if scheme is None or scheme.is_float or scheme.activation != "int8-dynamic":
            return None
        if decision.shape[0] == 1:
            return "LiteRT has no product with int8-dynamic activations and one output; use activation: none"
        if not scheme.symmetric:
            return "weights with int8-dynamic activations have no zero points in LiteRT; use symmetric: true"
        if block_of(scheme, decision.width) is None:
            if bits_of(scheme, decision.width) == 8:
                return "8-bit weights with int8-dynamic activations have one scale per channel; no groups"
            blocks = ", ".join(map(str, reversed(BLOCKS)))
            return (
                "LiteRT's 4-bit blocks with int8-dynamic activations are "
                f"{blocks} weights with bfloat16 scales"
            )
        return None

    def unpacks(self, decision: Decision) -> str | None:
        """Layers without int8 activations."""
        scheme = decision.scheme
        if scheme is None or scheme.is_static or is_kept(decision):
            return None
        return f"{scheme.label} of {decision.type} is float32 once loaded"

    def refuse_plan(self, plan: Plan) -> str | None:
        """A graph made for another runtime measures ranges by operators that litert-torch does not know."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        if plan.layout is None or plan.layout.engine != "graph" or all(s.is_static for s in schemes):
            return None
        return "litert: of the graph engine only int8-static models can be exported; use engine: modules"

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Convert a model of marks, and put the integers in their place."""
        from qaware.exporters.litert_cache import cached_signatures
        from qaware.exporters.litert_convert import convert
        from qaware.exporters.litert_flatbuffer import Flatbuffer
        from qaware.exporters.litert_integer import use_integers
        from qaware.exporters.litert_marks import use_marks
        from qaware.exporters.litert_runner import SERVE
        from qaware.exporters.litert_sizes import find_sizes
        from qaware.exporters.litert_weights import put_integers

        cache = cache_of(quantized.module, signature, self.cache_length)
        to_float32(quantized)
        module = in_evaluation(signature.wrap(quantized.module.cpu()))
        if cache is None:
            sizes, inputs = find_sizes(module, [tensor.cpu() for tensor in example], signature)
            about = {"cache": None, "sizes": dataclasses.asdict(sizes)}
            functions = {SERVE: (module, inputs)}
        else:
            about = {"cache": dataclasses.asdict(cache)}
            functions = cached_signatures(quantized.module, cache, signature.longest)
        marks = use_marks(quantized)
        file = Flatbuffer(convert(functions, marks))
        put_integers(file, marks)
        products = use_integers(file)
        file.require_builtin()
        file.describe(about)
        file.write(path)
        return Written(_about_products(products, quantized.plan), {"integer_products": products})

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """The converted model; of one in half precision the same integers in float32."""
        return in_float32(quantized)

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load a file.

        Raises:
            QawareError: LiteRT cannot read it or its inputs are not those of ``signature``.
        """
        from qaware.exporters.litert_runner import open_file

        return open_file(path, signature)


def _about_products(count: int, plan: Plan) -> tuple[str, ...]:
    total = sum(d.scheme is not None and d.scheme.is_static for d in plan.quantized.values())
    if not total:
        return ()
    layers = f"{count} of {counted(total, 'layer')} with static activations"
    return (f"integers are multiplied in {layers}, floats in the others",)
