"""AOTInductor: torch.export, then native code in one ``.pt2`` file for the CPU that compiles it.

Linear layers multiply integers, by one of two kernels: those of the eager and graph engines, with static
activations, by onednn's, which Inductor finds only with ``freezing``, with uint8 activations and with
torchao's passes for x86; all others by ours (``aoti_product.py``). Attention to a key-value cache has a
kernel of ours too (``aoti_attention.py``), on the same CPUs.

What neither computes stays packed in the file (``packed.py``) and is expanded to floats for each product.
Freezing would fold these integers back to float32 and the file would grow fourfold; so it is off without
onednn's layers, and with them it is kept from folding what unpacks an integer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from qaware import machine
from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.aoti_attention import can_attend
from qaware.exporters.aoti_compile import as_usual, compile_package, exported
from qaware.exporters.aoti_layers import has_product, use_products
from qaware.exporters.aoti_load import load, runner
from qaware.exporters.aoti_product import FEATURES
from qaware.exporters.base import Exporter, Runner, Tolerance, Written, first_line, one_step
from qaware.exporters.generation import cache_of
from qaware.exporters.int8_kernels import Kernels, kernels
from qaware.exporters.packed import PackedWeight
from qaware.exporters.packed_layers import PackedConvolution, PackedLinear, pack_layers
from qaware.exporters.signature import Signature
from qaware.exporters.static_limits import refuse_static
from qaware.plan import Decision, Plan
from qaware.wording import counted

PRODUCTS = ("integer", "float")


class AOTIExporter(Exporter):
    """``.pt2`` for PyTorch's C++ and Python runtimes; part of torch, but it needs a C++ compiler."""

    name = "aoti"
    suffix = ".pt2"
    tolerance = Tolerance(
        relative=0.03,
        kl=2e-3,
        reason=(
            "a sum in another order moves an activation to the next int8 step, which grows with depth up to "
            "the noise of int8 activations itself (0.017 in 4 to 32 layers); without them it is below 1e-3"
        ),
    )

    def __init__(self, *, products: str = "integer", cache_length: int | None = None) -> None:
        """
        Args:
            products: ``integer``: linear layers multiply their packed integers with integer activations, of
                16 bits where the scheme leaves them float. Needs AVX512-VNNI; elsewhere, and for widths other
                than 1, 2, 4 and 8 bits, it is as ``float``: weights are expanded to floats for each product,
                several times slower, which differs from the converted model by the order of sums only.
            cache_length: of a language model, tokens that its key-value cache holds; default the model's
                context, at most 1024. Memory is taken as a text grows.

        Raises:
            QawareError: another word for ``products``.
        """
        if products not in PRODUCTS:
            raise QawareError(f"products: {products!r} is not one of {', '.join(PRODUCTS)}")
        self.products, self.cache_length = products, cache_length

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """What the file is bound to."""
        return ("compiled for the CPU features of the machine that exported it; some 0.2 MB are code",)

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """Without ranges measured at run time there is no rounding to flip; a static one flips by a step."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        if any(s.activation == "int8-dynamic" for s in schemes):
            return self.tolerance
        if plan.layout is not None and any(s.is_static for s in schemes):
            return one_step(self.tolerance)
        if any(s.is_static for s in schemes) or not self.multiplies_integers:
            return Tolerance(2e-5, 1e-8, "float32 sums in another order")
        return Tolerance(
            1e-3, 1e-6, "activations of weight-only layers are rounded to 16 bits for each token"
        )

    def missing(self) -> str | None:
        """Inductor's own search for a compiler; nothing is compiled."""
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "aoti: no C++ compiler was found; install g++ (apt install g++) or name one in CXX"
        return super().missing()

    def refuse(self, decision: Decision) -> str | None:
        """Static layers have the limits of onednn's kernels; all others are computed from their integers."""
        scheme = decision.scheme
        return None if scheme is None or not scheme.is_static else refuse_static(scheme, "onednn")

    def unpacks(self, decision: Decision) -> str | None:
        """Layers that neither our product nor onednn's kernels are for."""
        scheme = decision.scheme
        if scheme is None or scheme.is_static or decision.type == "Embedding":
            return None
        if scheme.is_float:
            return "float16 weights are widened for each product"
        if self.multiplies_integers and has_product(scheme, decision.type, decision.width):
            return None
        if not self.multiplies_integers:
            return "integer products need AVX512-VNNI"
        return f"{scheme.label} of {decision.type} is expanded to floats for each product"

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Pack the layers, trace with dynamic axes, compile, and look what the code calls."""
        cache = cache_of(quantized.module, signature, self.cache_length)
        attends = cache is not None and self._has_vectors and can_attend(quantized.module, cache)
        products = use_products(quantized) if self.multiplies_integers else []
        pack_layers(quantized)
        packed = any(isinstance(part, PackedWeight) for part in quantized.module.modules())
        with as_usual():
            program, planned = exported(quantized.module, example, signature, cache, attends)
            compile_package(program, path, planned > 0, packed, cache)
        found = _found(kernels(path), planned, quantized.module) if planned else Written()
        notes = (*_about_products(products, quantized.module), *found.notes)
        return Written(notes, {**found.details, "products": len(products)})

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load native code; the caller has checked where it comes from.

        Raises:
            QawareError: the file is damaged, or needs vector instructions that this CPU lacks.
        """
        try:
            return runner(load(path), signature)
        except QawareError:
            raise
        except Exception as error:
            raise QawareError(
                f"{path}: AOTInductor cannot load it ({first_line(error)}); export it again"
            ) from error

    @property
    def multiplies_integers(self) -> bool:
        """Whether linear layers do, as far as the kernel knows their widths."""
        return self.products == "integer" and self._has_vectors

    @property
    def _has_vectors(self) -> bool:
        return set(FEATURES) <= set(machine.cpu()["features"])


def _about_products(products: list[str], module: nn.Module) -> list[str]:
    """How linear layers are computed: activations of the products, and layers that are none."""
    notes = []
    if products:
        exact = sum(activation != "none" for activation in products)
        kinds = [f"{exact} with int8 activations"] if exact else []
        if exact < len(products):
            kinds.append(f"{len(products) - exact} with activations rounded to 16 bits for each token")
        layers = counted(len(products), "linear layer")
        notes.append(f"packed integers are multiplied in {layers}: {', '.join(kinds)}")
    floats = sum(
        type(part) is PackedLinear or isinstance(part, PackedConvolution) for part in module.modules()
    )
    if floats:
        layers = counted(floats, "layer")
        notes.append(f"integers of {layers} are expanded to floats for each product: small, not fast")
    return notes


def _found(made: Kernels, planned: int, module: nn.Module) -> Written:
    """What became of the layers that were to be int8 kernels, and whether other integers became floats."""
    done = sum(made.int8.values())
    layers = f"{done} of {counted(planned, 'layer')} with static activations"
    counts = ", ".join(f"{kind} {count}" for kind, count in made.int8.items() if count)
    notes = [f"int8 kernels of onednn compute {layers}" + (f" ({counts})" if counts else "")]
    if done < planned:
        notes.append(f"float kernels compute {planned - done} of them")
    # A folded weight is a float constant of its size; the file's floats differ by nothing else.
    floats = {t.data_ptr(): t.nbytes for t in module.state_dict().values() if t.dtype == torch.float32}
    grown = made.constants.get("float32", 0) - sum(floats.values())
    sizes = [part.scale.shape[0] * part.width for part in module.modules() if isinstance(part, PackedWeight)]
    if sizes and grown > 2 * min(sizes):
        notes.append(f"{grown:,} bytes of integers were expanded to floats in the file")
    return Written(tuple(notes), {"kernels": dataclasses.asdict(made), "planned_int8": planned})
