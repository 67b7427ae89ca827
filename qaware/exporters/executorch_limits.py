"""What XNNPACK and ExecuTorch's embedding kernels hold, and in which widths.

The limits were tried on executorch 1.5.1 (XNNPACK partitioner, x86-64). Two of them are the reason why every
artifact must be compared with the converted model: a weight-only linear layer loses its scales, and an
asymmetric one its zero points, without an error or a warning.
"""

from __future__ import annotations

from qaware.exporters.static_limits import refuse_static
from qaware.matching import CONVOLUTIONS
from qaware.plan import Decision, Plan
from qaware.roundings import Q40
from qaware.scheme import Scheme

_BLOCK = 32
"""XNNPACK's int4 kernels read groups in multiples of this (``_check_per_channel_group_params``)."""
_EMBEDDING_BITS = (2, 4, 8)
"""Kernels ``quantized_decomposed::embedding_{2bit,4bit,byte}`` of the runtime."""
_LINEAR_BITS = (4, 8)
"""XNNPACK's kernels ``qb4w``, ``qc4w`` and ``qc8w``."""


def refusal(decision: Decision) -> str | None:
    """Why XNNPACK, or ExecuTorch's embedding kernels, cannot hold one layer as planned, or None."""
    scheme = decision.scheme
    if scheme is None or scheme.is_float:
        return None
    if decision.type == "Embedding":
        return _refuse_embedding(scheme, decision.width)
    if scheme.is_static:
        return refuse_static(scheme, "XNNPACK")
    if scheme.activation == "none":
        kind = "convolutions" if decision.type in CONVOLUTIONS else "linear layers"
        return f"weight-only int{scheme.bits} {kind} lose their scales on XNNPACK, silently"
    return _refuse_weight(scheme, decision.width)


def signed_scales(plan: Plan) -> str | None:
    """Why XNNPACK cannot hold what the rounding of a plan may give a linear layer, or None."""
    step = next((step for step in plan.recipe.steps if getattr(step, "signed", False)), None)
    if step is None or not any(_turns(decision) for decision in plan.quantized.values()):
        return None
    if isinstance(step, Q40):
        return f"rounding.{step.name} makes scales below zero, which XNNPACK refuses; use mse"
    return (
        f"rounding.{step.name}.signed: true makes scales below zero, which XNNPACK refuses; leave signed out"
    )


def _turns(decision: Decision) -> bool:
    """Whether a scale below zero is another grid for this layer, and its kernel is XNNPACK's."""
    scheme = decision.scheme
    if scheme is None or scheme.is_float or scheme.is_static or decision.type == "Embedding":
        return False
    return scheme.symmetric and not scheme.is_mirrored


def kernel_bits(decision: Decision) -> int | None:
    """Bits of the narrowest kernel that holds the integers of a layer; None where that is no choice."""
    scheme = decision.scheme
    if scheme is None or scheme.is_float or scheme.is_static:
        return None
    return _narrowest(scheme, _EMBEDDING_BITS if decision.type == "Embedding" else _LINEAR_BITS)


def widened(decision: Decision) -> str | None:
    """The scheme's width and that of its kernel, where these differ."""
    bits = kernel_bits(decision)
    if bits is None or decision.scheme is None or bits == decision.scheme.bits:
        return None
    return f"{decision.scheme.bits} bits take {bits}"


def _refuse_embedding(scheme: Scheme, width: int) -> str | None:
    """``width`` is embedding_dim. Any group and zero points are held; scales are stored in float32."""
    bits = _narrowest(scheme, _EMBEDDING_BITS)
    if bits != scheme.bits and scheme.levels == "all":
        return f"int{scheme.bits} embeddings have no kernel; 2, 4 and 8 bits have one"
    share = 8 // bits
    if width % share:
        return f"int{bits} embeddings put {share} weights in a byte, which does not divide {width}"
    return None


def _refuse_weight(scheme: Scheme, width: int) -> str | None:
    """Of a linear layer with dynamic activations; ``width`` is in_features."""
    block = scheme.block(width)
    bits = _narrowest(scheme, _LINEAR_BITS)
    if bits == 8 and scheme.bits < 8 and scheme.levels == "all":
        return f"int{scheme.bits} linear layers have no kernel on XNNPACK; up to 4 bits and 8 bits have one"
    if not scheme.symmetric:
        return "asymmetric weights of linear layers lose their zero points on XNNPACK, silently"
    if bits == 8 and scheme.group_size:
        taken = "" if scheme.bits == 8 else f"{scheme.levels} has integers of {scheme.stored_bits} bits; "
        return f"{taken}int8 linear layers have one scale per channel on XNNPACK, no groups"
    if bits == 4 and block % _BLOCK:
        return f"int4 linear layers need groups that are a multiple of {_BLOCK} on XNNPACK, not {block}"
    if bits == 4 and scheme.scale_dtype != "bfloat16":
        return (
            f"XNNPACK stores int4 scales as bfloat16, which would change {scheme.scale_dtype} ones silently"
        )
    return None


def _narrowest(scheme: Scheme, kernels: tuple[int, ...]) -> int:
    return next(bits for bits in kernels if bits >= scheme.stored_bits)
