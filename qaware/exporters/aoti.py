"""AOTInductor: torch.export, then native code in one ``.pt2`` file for the CPU that compiles it.

The integers stay packed in the file (``packed.py``) and are expanded to floats for each product, so the
file is small and computes what the converted model computes; the products are float ones. Inductor's
``freezing`` is left off: it would fold the integers back to float32 and the file would grow fourfold.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qaware import machine, quiet
from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.base import Exporter, Runner, Tolerance, first_line
from qaware.exporters.packed import pack_layers
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
    "freezing": False,
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
        """The same for every plan."""
        return (
            "integers are expanded to floats for each product: the file is small, the arithmetic is float",
            "compiled for the CPU features of the machine that exported it; half a megabyte is code",
        )

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """Without ranges measured at run time there is no rounding to flip."""
        dynamic = any(d.scheme and d.scheme.activation == "int8-dynamic" for d in plan.quantized.values())
        return self.tolerance if dynamic else Tolerance(2e-5, 1e-8, "float32 sums in another order")

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
        """Nothing: every width, group, zero point and activation is computed from its integers."""
        return None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> None:
        """Pack the layers, trace with dynamic axes, compile."""
        pack_layers(quantized)
        module = signature.wrap(quantized.module).cpu().eval()
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                module, _traceable(example, signature), dynamic_shapes=(_dynamic(signature),), strict=False
            )
            # A stream keeps the temporary file's name out of the archive.
            with path.open("wb") as file:
                torch._inductor.aoti_compile_and_package(
                    program, package_path=file, inductor_configs=dict(_INDUCTOR)
                )

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
