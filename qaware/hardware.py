"""Schemes whose fast kernels are on other hardware: they train, convert and are scored everywhere, from
weights that are unpacked first, and ``qaware check`` says where they are multiplied as they are.

From torchchat's ``docs/quantization.md``, of torchao's low-bit kernels for ARM CPUs and for Apple's GPUs, and
of its int4 kernel for CUDA (tinygemm).
"""

from __future__ import annotations

from collections import Counter

from qaware.plan import Decision, Plan
from qaware.scheme import Scheme
from qaware.wording import counted

_LARGEST_LOW = 7
_ARM_LINEAR, _ARM_EMBEDDING, _XNNPACK = 16, 32, 32
"""What groups must be a multiple of."""
_GPU_GROUPS = (32, 64, 128, 256)


def hardware_notes(plan: Plan) -> list[str]:
    """One line for each scheme of ``plan`` with kernels on other hardware, with the number of its layers."""
    found = Counter(
        f"{decision.type} {decision.scheme.label}: {where}"
        for decision in plan.quantized.values()
        if decision.scheme is not None and (where := fast_on(decision))
    )
    return [f"{line} ({counted(count, 'layer')})" for line, count in found.items()]


def fast_on(decision: Decision) -> str | None:
    """The hardware with kernels for the scheme of a layer; None for layers that stay float or 8 bits, and for
    those of a kind that XNNPACK multiplies anywhere."""
    scheme = decision.scheme
    if scheme is None or scheme.stored_bits > _LARGEST_LOW or scheme.is_static:
        return None
    if decision.type == "Embedding":
        return None if scheme.symmetric else _arm(scheme, decision.width, _ARM_EMBEDDING)
    if decision.type != "Linear":
        return None
    if scheme.activation == "int8-dynamic":
        common = scheme.stored_bits <= 4 and scheme.symmetric and scheme.block(decision.width) % _XNNPACK == 0
        return None if common else _arm(scheme, decision.width, _ARM_LINEAR)
    return _gpu(scheme)


def _arm(scheme: Scheme, width: int, multiple: int) -> str:
    if scheme.block(width) % multiple == 0:
        return "fast on ARM CPUs with torchao's low-bit kernels; elsewhere unpacked first"
    return f"unpacked first everywhere; groups of a multiple of {multiple} are fast on ARM CPUs"


def _gpu(scheme: Scheme) -> str | None:
    """Weight-only, whose kernels take zero points."""
    if scheme.symmetric:
        return None
    if scheme.group_size not in _GPU_GROUPS:
        return f"unpacked first everywhere; groups of {', '.join(map(str, _GPU_GROUPS))} are fast on GPUs"
    gpus = "Apple's GPUs, and CUDA's" if scheme.bits == 4 else "Apple's GPUs"
    return f"fast on {gpus} with torchao's kernels; elsewhere unpacked first"
