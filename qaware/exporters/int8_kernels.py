"""What a compiled AOTInductor package calls, read from the generated code that it carries.

Inductor turns a quantized operator into an int8 kernel only where every condition of its patterns holds,
and otherwise into a float one, without a word.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_KERNEL = re.compile(r"\baoti_torch_cpu_(\w+)\(")
_CONSTANT = re.compile(r"\.dtype = cached_torch_dtype_(\w+);(?:.*\n){1,3}?.*\.data_size = (\d+);")
_INT8 = ("qconv", "qlinear")
_FLOAT = ("convolution", "linear", "addmm", "baddbmm", "bmm", "mm")


@dataclass(frozen=True)
class Kernels:
    """Calls in one package."""

    int8: dict[str, int]
    """``qconv`` and ``qlinear``: integer products of onednn."""
    floating: dict[str, int]
    """Float convolutions and products, by the name of their kernel; products of activations count too."""
    constants: dict[str, int]
    """Bytes of the weights by dtype, as the code declares them."""


def kernels(path: Path) -> Kernels:
    """Read a ``.pt2``."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
        code = "\n".join(archive.read(name).decode("utf-8") for name in names)
    calls = Counter(_KERNEL.findall(code))
    int8 = {kind: sum(n for call, n in calls.items() if kind in call) for kind in _INT8}
    floating = {call: n for call, n in calls.items() if _is_float(call)}
    constants: Counter[str] = Counter()
    for dtype, size in _CONSTANT.findall(code):
        constants[dtype] += int(size)
    return Kernels(int8, floating, dict(constants))


def _is_float(call: str) -> bool:
    return not any(kind in call for kind in _INT8) and any(kind in call for kind in _FLOAT)
