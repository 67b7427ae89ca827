"""AOTInductor: torch.export, then native code in one ``.pt2`` file for the CPU that compiles it.

Layers with static activations become int8 kernels of onednn, which Inductor finds only with ``freezing``,
with uint8 activations and with torchao's passes for x86.

The other integers stay packed in the file (``packed.py``) and are expanded to floats for each product, so
the file is small and computes what the converted model computes; the products are float ones. Freezing
would fold these integers back to float32 and the file would grow fourfold; so it is off without static
layers, and with them it is kept from folding what unpacks an integer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaware import machine, quiet
from qaware.engines.base import QuantizedModel
from qaware.engines.x86 import x86_quantizer
from qaware.errors import QawareError
from qaware.exporters.base import Exporter, Runner, Tolerance, Written, first_line, in_evaluation, one_step
from qaware.exporters.int8_kernels import Kernels, kernels
from qaware.exporters.packed import PackedWeight, pack_layers
from qaware.exporters.signature import Signature
from qaware.plan import Decision, Plan

_MODEL = "model"  # the name inside the package, torch's default
_INDUCTOR: dict[str, Any] = {
    # Debug tables are two thirds of a small file (1.8 MB against 0.6) and a quarter of the compile time.
    "aot_inductor.enable_line_tables": False,
    # The number of threads is the loading process's business; the default compiles in this one's.
    "cpp.dynamic_threads": True,
    # A bfloat16 model rounds between operators; fused without it, it differs from itself by 0.4%.
    "emulate_precision_casts": True,
}
# What a file compiled for AOTI_CPU_ISA needs, in the words of /proc/cpuinfo.
_FEATURES = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni", "AMX_TILE": "amx_bf16"}


class AOTIExporter(Exporter):
    """``.pt2`` for PyTorch's C++ and Python runtimes; part of torch, but it needs a C++ compiler."""

    name = "aoti"
    suffix = ".pt2"
    tolerance = Tolerance(
        relative=0.03,
        kl=2e-3,
        reason=(
            "a sum in another order moves an activation to the next int8 step, which grows with depth up to "
            "the noise of int8 activations itself (0.017 in 4 to 32 layers); without them it is below 1e-6"
        ),
    )

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """Which products are float ones, and what the file is bound to."""
        expanded = (
            "integers are expanded to floats for each product: the file is small, the arithmetic is float"
        )
        where = "compiled for the CPU features of the machine that exported it; half a megabyte is code"
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        if plan.layout is not None and all(s.is_static for s in schemes):
            return (where,)
        return (expanded if plan.layout is None else f"without static activations, {expanded}", where)

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """Without ranges measured at run time there is no rounding to flip; a static one flips by a step."""
        schemes = [d.scheme for d in plan.quantized.values() if d.scheme]
        if any(s.activation == "int8-dynamic" for s in schemes):
            return self.tolerance
        if plan.layout is not None and any(s.is_static for s in schemes):
            return one_step(self.tolerance)
        return Tolerance(2e-5, 1e-8, "float32 sums in another order")

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
        if scheme is None or not scheme.is_static:
            return None
        if not scheme.symmetric:
            return "asymmetric weights lose their zero points in onednn's int8 kernels, silently"
        if scheme.group_size:
            return "layers with int8-static activations have one scale per channel in onednn, no groups"
        return None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Pack the layers, trace with dynamic axes, compile, and look what the code calls."""
        pack_layers(quantized)
        packed = any(isinstance(part, PackedWeight) for part in quantized.module.modules())
        with torch.no_grad(), _quiet():
            program, planned = _exported(quantized.module, example, signature)
            _compile(program, path, frozen=planned > 0, packed=packed)
        return _found(kernels(path), planned, quantized.module) if planned else Written()

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load native code; the caller has checked where it comes from.

        Raises:
            QawareError: the file is damaged, or needs vector instructions that this CPU lacks.
        """
        try:
            loader = _load(path)
        except QawareError:
            raise
        except Exception as error:
            raise QawareError(
                f"{path}: AOTInductor cannot load it ({first_line(error)}); export it again"
            ) from error

        def run(*tensors: Tensor) -> Tensor:
            # The example's strides are compiled in and not checked.
            output: Tensor = loader.run([t.detach().cpu().contiguous() for t in tensors])[0]
            return output.float()

        return run


def _exported(module: nn.Module, example: tuple[Tensor, ...], signature: Signature) -> tuple[Any, int]:
    """The program, and how many of its layers are to be int8 kernels."""
    # Late: it registers operators, which plans without static activations have no use for.
    from qaware.exporters.qdq import clean, decompose, integer_layers, straighten
    from qaware.exporters.qdq_channels import widen_channels

    decompose(module)
    program = torch.export.export(
        in_evaluation(signature.wrap(module).cpu()),
        _traceable(example, signature),
        dynamic_shapes=(_dynamic(signature),),
        strict=False,
    )
    if clean(program.graph_module, torch.uint8, whole=False):
        straighten(program.graph_module)
        widen_channels(program.graph_module)
    return program, integer_layers(program.graph)


def _compile(program: Any, path: Path, frozen: bool, packed: bool) -> None:
    """Write the package; ``frozen`` for int8 kernels, ``packed`` where other integers must stay integers."""
    with contextlib.ExitStack() as stack:
        if frozen:
            x86_quantizer()  # registers the passes that make int8 kernels
            stack.enter_context(_unfolded(packed))
        # A stream keeps the temporary file's name out of the archive.
        file = stack.enter_context(path.open("wb"))
        torch._inductor.aoti_compile_and_package(
            program, package_path=file, inductor_configs={**_INDUCTOR, "freezing": frozen}
        )


@contextlib.contextmanager
def _unfolded(packed: bool) -> Iterator[None]:
    """Keep freezing from computing, once and for all, the floats of packed integers."""
    from torch._inductor import constant_folding

    ops: Any = torch.ops
    kept = (ops.prims.convert_element_type.default, ops.aten.bitwise_and.Scalar, ops.aten.bitwise_and.Tensor)
    before = list(constant_folding._dont_constant_fold)
    for operator in kept if packed else ():
        constant_folding.add_dont_constant_fold(operator)
    try:
        yield
    finally:
        constant_folding._dont_constant_fold[:] = before


def _found(made: Kernels, planned: int, module: nn.Module) -> Written:
    """What became of the layers that were to be int8 kernels, and whether other integers became floats."""
    done = sum(made.int8.values())
    counts = ", ".join(f"{kind} {count}" for kind, count in made.int8.items() if count)
    notes = [f"{done} of {planned} layers with static activations are int8 kernels of onednn ({counts})"]
    if done < planned:
        notes.append(f"{planned - done} of them are float kernels")
    # A folded weight is a float constant of its size; the file's floats differ by nothing else.
    floats = {t.data_ptr(): t.nbytes for t in module.state_dict().values() if t.dtype == torch.float32}
    grown = made.constants.get("float32", 0) - sum(floats.values())
    sizes = [part.scale.shape[0] * part.width for part in module.modules() if isinstance(part, PackedWeight)]
    if sizes and grown > 2 * min(sizes):
        notes.append(f"{grown:,} bytes of integers were expanded to floats in the file")
    return Written(tuple(notes), {"kernels": dataclasses.asdict(made), "planned_int8": planned})


def _traceable(example: tuple[Tensor, ...], signature: Signature) -> tuple[Tensor, ...]:
    """The example with every dynamic axis at least 2 long, values repeated: 1 would become a constant."""
    inputs = []
    for spec, tensor in zip(signature.inputs, example, strict=True):
        for axis, symbol in enumerate(spec.shape):
            if isinstance(symbol, str) and tensor.shape[axis] < min(2, signature.symbols[symbol][1]):
                tensor = tensor.repeat_interleave(2, axis)
        inputs.append(tensor.detach().cpu().contiguous())
    return tuple(inputs)


def _dynamic(signature: Signature) -> tuple[dict[int, Any], ...]:
    """For each input, the dynamic axes and their bounds; an axis with one legal size is a constant."""
    dims = {
        symbol: torch.export.Dim(symbol, min=low, max=high)
        for symbol, (low, high) in signature.symbols.items()
        if low < high
    }
    return tuple({a: dims[s] for a, s in enumerate(spec.shape) if s in dims} for spec in signature.inputs)


def _load(path: Path) -> Any:
    """The native model of a package.

    Unpacked here rather than by torch: its own copy in the temporary folder outlives a killed process,
    and damage is noticed by the checksums. And not by ``aoti_load_package``: with a cold cache that
    compiles ten probes of this CPU (14 s, and it needs a compiler), only to warn when they differ.
    """
    with tempfile.TemporaryDirectory(prefix="qaware-aoti-", ignore_cleanup_errors=True) as folder:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        _require_features(path, Path(folder))
        return torch._C._aoti.AOTIModelPackageLoader(folder, _MODEL, False, 1, -1)


def _require_features(path: Path, folder: Path) -> None:
    """Vector instructions that a CPU lacks end the process, so they are compared first."""
    metadata = next(folder.rglob("*wrapper_metadata.json"), None)
    isa = json.loads(metadata.read_text(encoding="utf-8")).get("AOTI_CPU_ISA", "") if metadata else ""
    here = machine.cpu()["features"]
    lacking = [name for name in isa.split() if name in _FEATURES and _FEATURES[name] not in here]
    if lacking:
        raise QawareError(
            f"{path}: was compiled for a CPU with {', '.join(lacking)}, which this one lacks; export it here"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The project's own filters again, in case somebody has reset them since the import."""
    with warnings.catch_warnings():
        quiet.install()
        yield
