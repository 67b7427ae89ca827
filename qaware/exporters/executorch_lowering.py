"""A converted model in the form that ExecuTorch's XNNPACK backend lowers: layers that its patterns recognize,
and a program with the sizes that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.base import QuantizedModel
from qaware.engines.integer import Float16Embedding, Float16Linear, StaticLinear
from qaware.errors import QawareError
from qaware.exporters.base import in_evaluation
from qaware.exporters.executorch_limits import kernel_bits, widened
from qaware.exporters.signature import Signature

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, torch.fx.GraphModule)
"""What a graph holds is not known by its modules."""
_GUARDED = 16
"""The batch size at which torch's choice of a convolution changes (``use_mkldnn`` in Convolution.cpp)."""


def with_whole_biases(quantized: QuantizedModel) -> nn.Module:
    """Biases as the int32 that XNNPACK adds, in units of input scale times weight scale, in place."""
    for name, grid in quantized.activations.items():
        layer: Any = quantized.module.get_submodule(name)
        scale = quantized.weights[name].scale
        if scale is not None and getattr(layer, "bias", None) is not None:
            unit = scale.flatten().double() * grid.scale
            layer.bias.data = ((layer.bias.double() / unit).round() * unit).float()
    return quantized.module


def fit_kernels(quantized: QuantizedModel) -> None:
    """Integers of other widths say that they are those of the narrowest kernel that holds them, in place."""
    for name, decision in quantized.plan.quantized.items():
        weight = getattr(quantized.module.get_submodule(name), "weight", None) if widened(decision) else None
        if isinstance(weight, IntxUnpackedToInt8Tensor):
            weight.target_dtype = getattr(torch, f"int{kernel_bits(decision)}")


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


def widen(module: nn.Module) -> nn.Module:
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


def partitioner() -> Any:
    """XNNPACK without unsqueeze: its serializer raises for two dynamic axes, which its check lets pass."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    keep = [c for c in ALL_PARTITIONER_CONFIGS if c.target_name != "unsqueeze_copy.default"]
    return XnnpackPartitioner(configs=keep)


def exported(
    module: nn.Module,
    example: tuple[Tensor, ...],
    signature: Signature,
    hold: Callable[[nn.Module], nn.Module] | None = None,
) -> Any:
    """The program of ``module``, which may be a converted graph, with one pair of operators at each grid.

    With ``hold``, which gives a decoder its cache, the inputs are token ids and their positions.
    """
    from qaware.exporters.qdq import clean, decompose, float_conv1d

    _refuse_rounded_inputs(module)
    decompose(module)
    inputs, dynamic = _traceable(example, signature, module), _dynamic_axes(signature)
    wrapped: nn.Module = signature.wrap(_adapt(widen(module)))
    if hold is not None:
        wrapped, at = hold(module), torch.arange(inputs[0].shape[1])
        # Of the same length as the ids, which are the only input of the signature.
        inputs, dynamic = (inputs[0], at), (dynamic[0], {a - 1: dim for a, dim in dynamic[0].items()})
    wrapped = in_evaluation(wrapped.requires_grad_(False).cpu())
    # Those of a Deployable stand for its ``*tensors``, inside one tuple.
    shapes: Any = dynamic if hold is not None else (dynamic,)
    program = torch.export.export(wrapped, inputs, dynamic_shapes=shapes, strict=False)
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


def _dynamic_axes(signature: Signature) -> tuple[dict[int, Any], ...]:
    """One mapping an input."""
    dims = {
        name: torch.export.Dim(name, min=low, max=_traced(high))
        for name, (low, high) in signature.symbols.items()
        if low < high
    }
    return tuple({i: dims[size] for i, size in enumerate(s.shape) if size in dims} for s in signature.inputs)


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


def require_sizes(program: Any, lowered: Any) -> None:
    """Memory is planned for the largest sizes, which operators may have limited while they were lowered."""
    for symbol, wanted in program.range_constraints.items():
        found = lowered.range_constraints.get(symbol)
        if found is None or found.lower == found.upper or found.upper < wanted.upper:
            limit = "one size" if found is None or found.lower == found.upper else str(found.upper)
            raise QawareError(f"executorch: a dynamic axis of up to {wanted.upper} was limited to {limit}")
