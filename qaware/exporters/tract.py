"""tract, Sonos' inference engine: integer products where activations are static, else integers of the weights
and activations in float32."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.base import QuantizedModel
from qaware.engines.static_integer import IntegerLayer
from qaware.errors import QawareError
from qaware.exporters.base import Exporter, Runner, Tolerance, Written
from qaware.exporters.generation import cache_of
from qaware.exporters.signature import Signature
from qaware.exporters.static_limits import refuse_static
from qaware.exporters.tract_dump import products
from qaware.exporters.tract_programs import CACHE_LENGTH, FORMS, LONG_INPUTS
from qaware.matching import CONVOLUTIONS
from qaware.plan import Decision, Plan
from qaware.wording import counted

PLAIN: dict[str, type[nn.Module]] = {
    "Linear": nn.Linear,
    "Embedding": nn.Embedding,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
}
"""The classes of float layers, by the type that a plan gives."""
Q40_BITS = 4
Q40_BLOCK = 32
_PRODUCTS = ("float", "integer")
_LONG = {
    "float": "more than 2 tokens at once are multiplied by weights expanded to float32, 32 bits each in "
    "memory from the first such input on (Q4_0 blocks are slower there); prefill: packed keeps them packed",
    "packed": "prefill: packed: inputs of many tokens are multiplied by Q4_0 blocks, slower than float",
}


_IN_FLOAT = "convolutions with a scale per channel, faster so than as integers (option convolutions)"


class TractExporter(Exporter):
    """An NNEF archive that tract loads: Q4_0 for up to 4 bits, else int8 or float16."""

    name = "tract"
    suffix = ".nnef.tgz"
    packages = ("tract", "torch_to_nnef")
    extra = "tract"
    tolerance = Tolerance(
        relative=1e-5,
        kl=1e-8,
        reason="float32 sums in another order: 2e-7 on one layer, 1e-6 on 12; an int4 one step off is 3e-5",
    )

    def __init__(
        self, *, cache_length: int | None = None, prefill: str = "float", convolutions: str = "float"
    ) -> None:
        """
        Args:
            cache_length: of a language model, tokens that its key-value cache holds; default the model's
                context, at most 1024. Only those that are used take memory.
            prefill: how Q4_0 weights are multiplied when there are more than two tokens, ``float``: expanded
                to float32 once, at the first such input, as fast as a float model and with its memory on top;
                or ``packed``: as they are stored, four times slower for 128 tokens and without more memory.
            convolutions: how those with static int8 activations and a scale for each channel are multiplied,
                ``float``: weights expanded to float32 once, while tract loads, and activations rounded to
                int8 in float32, at 0.9 times the speed of a float model; or ``integer``: int8 products, whose
                rescaling takes longer than they save, 0.5 times (x86 with AVX-512 VNNI, tract 0.23.9).
                Linear layers and weights with one scale are multiplied as integers always.

        Raises:
            QawareError: another prefill, or other convolutions.
        """
        for key, value, known in (("prefill", prefill, FORMS), ("convolutions", convolutions, _PRODUCTS)):
            if value not in known:
                raise QawareError(f"{key}: {value!r} is not one of {', '.join(known)}")
        self.cache_length, self.prefill, self.convolutions = cache_length, prefill, convolutions

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """One step of the output where it is an integer; sums in another order are one at most."""
        if plan.layout is None or not plan.needs_calibration:
            return self.tolerance
        reason = "a bias rounded to int32, or a product on the edge between two integers, moves it by one"
        return Tolerance(relative=0.03, kl=2e-3, reason=reason, steps=1.0)

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """Float activations, and how bits are stored."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        static = [s for s in schemes if s.is_static]
        others = [s for s in schemes if not s.is_static]
        chosen = []
        if any(s.activation != "none" for s in (others if plan.layout is not None else schemes)):
            chosen.append("activations in float32: no int8 range is applied; weights keep their integers")
        if any(s.bits < 8 for s in static):
            chosen.append("weights of layers with static activations take 8 bits each, whatever their width")
        if any(s.stored_bits <= Q40_BITS for s in others):
            chosen.append("up to 4 bits take 4.5 bits a weight (Q4_0)")
            chosen.append(_LONG[self.prefill])
        if any(s.levels == "ternary" for s in others):
            chosen.append(
                "tract's ternary block (Q2_0_T) is not read from NNEF files: ternary takes Q4_0 too"
            )
        if any(Q40_BITS < s.stored_bits <= 8 for s in others):
            chosen.append("5 to 8 bits take int8 in the file and float32 once loaded")
        return tuple(chosen)

    def refuse(self, decision: Decision) -> str | None:
        """Only weights of up to 4 bits have limits, those of Q4_0; with static activations, zero points."""
        scheme = decision.scheme
        if scheme is not None and scheme.is_static:
            # A single zero point is a number of the product.
            held = dataclasses.replace(scheme, symmetric=True) if scheme.per_tensor else scheme
            return refuse_static(held, "tract")
        if scheme is None or scheme.stored_bits > Q40_BITS:
            return None
        if not scheme.symmetric:
            return f"{scheme.label} has zero points, which Q4_0 has not; use symmetric: true, or bits: 8"
        if decision.width % Q40_BLOCK or scheme.group_size % Q40_BLOCK:
            return (
                f"{scheme.label} on {decision.width} input weights does not fill Q4_0 blocks of "
                f"{Q40_BLOCK}; use groups and widths that are multiples of {Q40_BLOCK}, or bits: 8"
            )
        if scheme.scale_dtype == "float32":
            return f"{scheme.label} has float32 scales, Q4_0 float16; use scale_dtype: bfloat16 or float16"
        return None

    def unpacks(self, decision: Decision) -> str | None:
        """Wider than Q4_0, and convolutions."""
        scheme = decision.scheme
        if scheme is None or decision.type == "Embedding":
            return None
        if scheme.is_static:
            floats = decision.type in CONVOLUTIONS and not scheme.per_tensor and self.convolutions == "float"
            return _IN_FLOAT if floats else None
        if scheme.stored_bits > Q40_BITS:
            return "more than 4 bits are float32 once loaded"
        return "convolutions have no Q4_0 product" if decision.type in CONVOLUTIONS else None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Trace, replace the weights by their integers, write the archive; ask tract what it multiplies."""
        with _contained():
            from qaware.exporters.tract_lowering import write_nnef

            cache = cache_of(quantized.module, signature, self.cache_length)
            properties = {LONG_INPUTS: self.prefill}
            if cache is not None:
                properties[CACHE_LENGTH] = str(cache.length)
            floating = write_nnef(quantized, example, signature, path, cache, properties, self.convolutions)
        static = [part for part in quantized.module.modules() if isinstance(part, IntegerLayer)]
        counts = products(path) if static else None
        if counts is None:
            return Written()
        integers = counted(counts.get("I32", 0), "product")
        summary = f"tract multiplies integers in {integers}, floats in {counts.get('F32', 0)}"
        notes = [summary, *_multiplied_in_float(floating)]
        return Written(tuple(notes), {"products": counts})

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """The converted model, but without rounding what enters a layer that tract computes in float32."""
        module = copy.deepcopy(quantized.module)
        for name in quantized.weights:
            layer = module.get_submodule(name)
            if isinstance(layer, IntegerLayer):
                continue
            layer.__class__ = PLAIN[quantized.plan.layer(name).type]
            if isinstance(layer.weight, IntxUnpackedToInt8Tensor):
                layer.weight = nn.Parameter(_weight_only(layer.weight), requires_grad=False)
        return module.float().cpu()

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load an archive.

        Raises:
            QawareError: tract cannot read it or its inputs are not those of ``signature``.
        """
        from qaware.exporters.tract_runner import open_archive

        return open_archive(path, signature)


def _multiplied_in_float(floating: dict[str, str]) -> list[str]:
    from qaware.exporters.tract_int8 import RESCALED

    lines = [f"{name} is multiplied in float: {why}" for name, why in floating.items() if why != RESCALED]
    if chosen := len(floating) - len(lines):
        lines.append(f"the same integers are floats in {counted(chosen, 'convolution')}: {RESCALED}")
    return lines


def _weight_only(weight: IntxUnpackedToInt8Tensor) -> IntxUnpackedToInt8Tensor:
    return IntxUnpackedToInt8Tensor(
        weight.qdata,
        weight.scale,
        weight.zero_point,
        weight.target_dtype,
        weight.block_size,
        torch.float32,
        None,
    )


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Undo what torch_to_nnef leaves behind: a dynamo setting made on import, its log level, what it
    prints when it fails, and the tracer's advice on the model's own Python."""
    from torch._dynamo import config
    from torch.jit._trace import TracerWarning

    logger = logging.getLogger("torch_to_nnef")
    level, suppress_errors = logger.level, config.suppress_errors
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Advice to authors of libraries and of forwards; nothing that a user of qaware can act on.
            for category in (TracerWarning, FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)
        config.suppress_errors = suppress_errors
