"""What made a number: package versions and the CPU's features."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

_PACKAGES = (
    "qaware",
    "torch",
    "torchao",
    "lightning",
    "transformers",
    "executorch",
    "tract",
    "torch_to_nnef",
)
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "sve",
    "i8mm",
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on, Python's too."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu() -> dict[str, Any]:
    """Model name, architecture and the vector features that kernels choose by."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "machine": platform.machine(),
        "model": info.get("model name", platform.processor() or "unknown"),
        "features": [f for f in _FEATURES if f in flags],
    }


def _cpuinfo() -> dict[str, str]:
    """First processor of /proc/cpuinfo; empty where there is none (macOS, Windows)."""
    try:
        block = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
