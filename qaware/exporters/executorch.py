"""ExecuTorch: a ``.pte`` file whose layers run on XNNPACK (arm64 and x86-64 CPUs).

The limits below were tried on executorch 1.5.1 (XNNPACK partitioner, x86-64). Two of them are the
reason why every artifact must be compared with the converted model: a weight-only linear layer
loses its scales, and an asymmetric one its zero points, without an error or a warning.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.base import QuantizedModel
from qaware.engines.integer import Float16Embedding, Float16Linear, StaticLinear
from qaware.errors import QawareError
from qaware.exporters.base import Exporter, Runner, Tolerance, Written, in_evaluation, one_step
from qaware.exporters.delegation import delegation
from qaware.exporters.executorch_errors import explained
from qaware.exporters.signature import Signature
from qaware.matching import CONVOLUTIONS
from qaware.plan import Decision, Plan
from qaware.scheme import Scheme

_BLOCK = 32
"""XNNPACK's int4 kernels read groups in multiples of this (``_check_per_channel_group_params``)."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, torch.fx.GraphModule)
"""What a graph holds is not known by its modules."""
_GUARDED = 16
"""The batch size at which torch's choice of a convolution changes (``use_mkldnn`` in Convolution.cpp)."""
_EMBEDDING_BITS = (2, 4, 8)
"""Kernels ``quantized_decomposed::embedding_{2bit,4bit,byte}`` of the runtime."""
_LINEAR_BITS = (4, 8)
"""XNNPACK's kernels ``qb4w``, ``qc4w`` and ``qc8w``."""


class ExecuTorchExporter(Exporter):
    """Lowers to ExecuTorch's XNNPACK backend and runs on the runtime inside its wheel."""

    name = "executorch"
    suffix = ".pte"
    packages = ("executorch",)
    extra = "executorch"
    # Dropping the scales of a single layer costs 0.10 at least, half or double ones 0.03 to 0.8.
    tolerance = Tolerance(
        relative=0.05,
        kl=5e-3,
        reason=(
            "an activation between two int8 steps may be rounded to the other one, which grows with depth: "
            "0.008 and 1.2e-3 nats in 5 trained layers, 0.046 in 24 random ones; float16 layers: 0.003"
        ),
    )

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """One step of the output where it is an integer."""
        return one_step(self.tolerance) if plan.layout is not None else self.tolerance

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """Float16 arithmetic, and what is stored twice."""
        chosen = []
        if any(d.scheme and d.scheme.is_float for d in plan.quantized.values()):
            chosen.append("float16 linear layers multiply float16 activations; between layers it is float32")
        if any(d.scheme and d.scheme.is_static and d.scheme.bits < 8 for d in plan.quantized.values()):
            chosen.append("weights of layers with static activations take 8 bits each, whatever their width")
        widened = sorted({wide for d in plan.quantized.values() if (wide := _widened(d))})
        if widened:
            chosen.append(f"weights take the width of their kernels: {', '.join(widened)}")
        if any(d.tied_to for d in plan.quantized.values()):
            chosen.append("an embedding and a head that share a weight are stored twice")
        return tuple(chosen)

    def refuse(self, decision: Decision) -> str | None:
        """Why XNNPACK, or ExecuTorch's embedding kernels, cannot hold one layer as planned."""
        scheme = decision.scheme
        if scheme is None or scheme.is_float:
            return None
        if decision.type == "Embedding":
            return _refuse_embedding(scheme, decision.width)
        if scheme.is_static:
            return _refuse_static(scheme)
        if scheme.activation == "none":
            kind = "convolutions" if decision.type in CONVOLUTIONS else "linear layers"
            return f"weight-only int{scheme.bits} {kind} lose their scales on XNNPACK, silently"
        return _refuse_weight(scheme, decision.width)

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Export with the dynamic axes of ``signature``, lower to XNNPACK and write ``path``.

        Raises:
            QawareError: lowering limits a dynamic axis.
        """
        with _bare_root_logger():
            from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

            _fit_kernels(quantized)
            program = _exported(quantized.module, example, signature)
            edge = to_edge_transform_and_lower(program, partitioner=[_partitioner()])
            _require_sizes(program, edge.exported_program())
            found = delegation(edge.exported_program())
            # The flag fuses quantized embeddings, which have no kernel otherwise.
            lowered = edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
        with path.open("wb") as file:
            lowered.write_to_file(file)
        return Written(found.lines(), {"delegation": dataclasses.asdict(found)})

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """The converted model; of a bfloat16 one the same integers in float32, of the graph engine's, whose
        biases are float, one with the whole numbers that XNNPACK makes of them."""
        if quantized.plan.layout is not None and quantized.plan.layout.engine == "graph":
            return _with_whole_biases(copy.deepcopy(quantized))
        floats = [*quantized.module.parameters(), *quantized.module.buffers()]
        if all(t.dtype != torch.bfloat16 for t in floats):
            return quantized.module
        return _widen(copy.deepcopy(quantized.module))

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load ``path``.

        Returns:
            A callable: tensors as in ``signature`` to a float32 tensor of its own.

        Raises:
            QawareError: on loading and on each call, with the runtime's error code in words.
        """
        with explained(f"{path.name}: cannot be loaded"):
            import executorch.kernels.quantized  # noqa: F401  registers the kernels of quantized embeddings
            from executorch.runtime import Runtime

            # By path: the file is mapped, while bytes would be held twice.
            program = Runtime.get().load_program(path)
            program.load_method("forward")

        def run(*tensors: Tensor) -> Tensor:
            with explained(f"{path.name}: cannot run"):
                # The program keeps the method that it loaded, and this closure the program.
                method = program.load_method("forward")
                output: Tensor = method.execute([t.detach().cpu().contiguous() for t in tensors])[0]
            return output.float()

        return run


def _with_whole_biases(quantized: QuantizedModel) -> nn.Module:
    """Biases as the int32 that XNNPACK adds, in units of input scale times weight scale, in place."""
    for name, grid in quantized.activations.items():
        layer: Any = quantized.module.get_submodule(name)
        scale = quantized.weights[name].scale
        if scale is not None and getattr(layer, "bias", None) is not None:
            unit = scale.flatten().double() * grid.scale
            layer.bias.data = ((layer.bias.double() / unit).round() * unit).float()
    return quantized.module


def _refuse_embedding(scheme: Scheme, width: int) -> str | None:
    """``width`` is embedding_dim. Any group and zero points are held; scales are stored in float32."""
    bits = _kernel_bits(scheme, _EMBEDDING_BITS)
    if bits != scheme.bits and scheme.levels == "all":
        return f"int{scheme.bits} embeddings have no kernel; 2, 4 and 8 bits have one"
    share = 8 // bits
    if width % share:
        return f"int{bits} embeddings put {share} weights in a byte, which does not divide {width}"
    return None


def _refuse_static(scheme: Scheme) -> str | None:
    if scheme.group_size:
        return "layers with int8-static activations have one scale per channel on XNNPACK, no groups"
    if not scheme.symmetric:
        return "asymmetric weights lose their zero points on XNNPACK, silently"
    return None


def _refuse_weight(scheme: Scheme, width: int) -> str | None:
    """Of a linear layer with dynamic activations; ``width`` is in_features."""
    block = scheme.block(width)
    bits = _kernel_bits(scheme, _LINEAR_BITS)
    if bits == 8 and scheme.bits < 8:
        return f"int{scheme.bits} linear layers have no kernel on XNNPACK; up to 4 bits and 8 bits have one"
    if not scheme.symmetric:
        return "asymmetric weights of linear layers lose their zero points on XNNPACK, silently"
    if bits == 8 and scheme.group_size:
        return "int8 linear layers have one scale per channel on XNNPACK, no groups"
    if bits == 4 and block % _BLOCK:
        return f"int4 linear layers need groups that are a multiple of {_BLOCK} on XNNPACK, not {block}"
    if bits == 4 and scheme.scale_dtype != "bfloat16":
        return (
            f"XNNPACK stores int4 scales as bfloat16, which would change {scheme.scale_dtype} ones silently"
        )
    return None


def _kernel_bits(scheme: Scheme, kernels: tuple[int, ...]) -> int:
    """Bits of the narrowest kernel that holds the scheme's integers."""
    return next(bits for bits in kernels if bits >= scheme.stored_bits)


def _widened(decision: Decision) -> str | None:
    """The scheme's width and that of its kernel, where these differ."""
    scheme = decision.scheme
    if scheme is None or scheme.is_float or scheme.is_static:
        return None
    bits = _kernel_bits(scheme, _EMBEDDING_BITS if decision.type == "Embedding" else _LINEAR_BITS)
    return None if bits == scheme.bits else f"{scheme.bits} bits take {bits}"


def _fit_kernels(quantized: QuantizedModel) -> None:
    """Integers of other widths say that they are those of the narrowest kernel that holds them, in place."""
    for name, decision in quantized.plan.quantized.items():
        weight = getattr(quantized.module.get_submodule(name), "weight", None) if _widened(decision) else None
        if isinstance(weight, IntxUnpackedToInt8Tensor):
            assert decision.scheme is not None
            kernels = _EMBEDDING_BITS if decision.type == "Embedding" else _LINEAR_BITS
            weight.target_dtype = getattr(torch, f"int{_kernel_bits(decision.scheme, kernels)}")


class _HalfLinear(Float16Linear):
    """Multiplies in float16. A weight upcast in the graph would be folded to float32 in the file or, kept
    from that, go to a portable kernel that takes seconds where XNNPACK takes milliseconds."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), dtype of ``input``; the bias keeps its own."""
        product = F.linear(input.half(), self.weight).to(input.dtype)
        return product if self.bias is None else product + self.bias


def _adapt(module: nn.Module) -> nn.Module:
    """Give layers the form that the partitioner and the fusion of embeddings recognize, in place."""
    for part in module.modules():
        if isinstance(part, Float16Linear):
            part.__class__ = _HalfLinear
        elif isinstance(part, nn.Embedding):
            # Only gradients depend on these, and the fusion looks for a call without them.
            part.padding_idx, part.scale_grad_by_freq, part.sparse = None, False, False
    return module


def _widen(module: nn.Module) -> nn.Module:
    """bfloat16 to float32, in place: XNNPACK has no bfloat16 layers with int8 activations, and 1.4 none."""
    for part in module.modules():
        if isinstance(part, Float16Embedding) and part.dtype == torch.bfloat16:
            part.dtype = torch.float32
        for name, weight in list(part.named_parameters(recurse=False)):
            if weight.dtype == torch.bfloat16:
                setattr(part, name, nn.Parameter(weight.detach().to(torch.float32), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.dtype == torch.bfloat16:
                setattr(part, name, buffer.float())
    return module


def _partitioner() -> Any:
    """XNNPACK without unsqueeze: its serializer raises for two dynamic axes, which its check lets pass."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    keep = [c for c in ALL_PARTITIONER_CONFIGS if c.target_name != "unsqueeze_copy.default"]
    return XnnpackPartitioner(configs=keep)


def _exported(module: nn.Module, example: tuple[Tensor, ...], signature: Signature) -> Any:
    """The program of ``module``, which may be a converted graph, with one pair of operators at each grid."""
    from qaware.exporters.qdq import clean, decompose, float_conv1d

    _refuse_rounded_inputs(module)
    decompose(module)
    wrapped = signature.wrap(_adapt(_widen(module))).requires_grad_(False).cpu()
    inputs = _traceable(example, signature, module)
    program = torch.export.export(
        in_evaluation(wrapped), inputs, dynamic_shapes=_dynamic_shapes(signature), strict=False
    )
    if clean(program.graph_module, torch.int8, whole=True) and float_conv1d(program.graph):
        # XNNPACK's pass for Conv1d takes it for an int8 one, and writes a file that cannot be loaded.
        raise QawareError(
            "executorch: a float Conv1d beside int8 layers cannot be lowered; "
            "give every Conv1d int8-static, or none"
        )
    return program


def _refuse_rounded_inputs(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, StaticLinear):
            raise QawareError(
                f"{name}: XNNPACK's int8 layers need an integer output too, which engine: modules does not "
                "calibrate; use engine: eager"
            )


def _dynamic_shapes(signature: Signature) -> tuple[tuple[dict[int, Any], ...]]:
    """One mapping an input, inside the tuple that stands for ``*tensors``."""
    dims = {
        name: torch.export.Dim(name, min=low, max=_traced(high))
        for name, (low, high) in signature.symbols.items()
        if low < high
    }
    return (
        tuple({i: dims[size] for i, size in enumerate(s.shape) if size in dims} for s in signature.inputs),
    )


def _traced(high: int) -> int:
    """The largest size to trace: a convolution's guard, "16 or more", leaves of "16 or less" no choice."""
    return high + 1 if high == _GUARDED else high


def _traceable(example: tuple[Tensor, ...], signature: Signature, module: nn.Module) -> tuple[Tensor, ...]:
    """``example`` with other dynamic axes, values repeated: torch.export takes a 1 for a constant, and guards
    a convolution by whether its batch is below 16, so that needs an example as large as legal."""
    convolves = any(isinstance(part, _CONVOLUTIONS) for part in module.modules())
    inputs = []
    for tensor, spec in zip(example, signature.inputs, strict=True):
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str):
                high = _traced(signature.symbols[size][1])
                length = high if convolves else max(tensor.shape[axis], min(2, high))
                index = torch.arange(length, device=tensor.device) % tensor.shape[axis]
                tensor = tensor.index_select(axis, index)
        inputs.append(tensor.cpu())
    return tuple(inputs)


def _require_sizes(program: Any, lowered: Any) -> None:
    """Memory is planned for the largest sizes, which operators may have limited while they were lowered."""
    for symbol, wanted in program.range_constraints.items():
        found = lowered.range_constraints.get(symbol)
        if found is None or found.lower == found.upper or found.upper < wanted.upper:
            limit = "one size" if found is None or found.lower == found.upper else str(found.upper)
            raise QawareError(f"executorch: a dynamic axis of up to {wanted.upper} was limited to {limit}")


@contextlib.contextmanager
def _bare_root_logger() -> Iterator[None]:
    """ExecuTorch's logging gives a root logger without handlers one for good; prevent it."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
