"""What torch_to_nnef 0.24 needs to trace any model, and without a network; all of it undone afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch_to_nnef.exceptions import T2NErrorTorchJitTraceFailed
from torch_to_nnef.inference_target.tract import TractCli

from qaware.errors import QawareError
from qaware.exporters.base import first_line


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Let torch.jit.trace accept modules with properties that raise, such as ``LightningModule.trainer``:
    it reads every attribute in search of methods marked for scripting, which a trace has no use for."""
    search = torch._jit_internal.module_has_exports
    torch._jit_internal.module_has_exports = lambda module: False
    try:
        with _Spelled():
            yield
    except T2NErrorTorchJitTraceFailed as error:
        # Its own first line lists modules; what went wrong is the cause.
        raise QawareError(
            f"tract: the model cannot be traced: {first_line(error.__cause__ or error)}"
        ) from error
    finally:
        torch._jit_internal.module_has_exports = search


class _Spelled(TorchFunctionMode):
    """Spell out, while tracing, what torch_to_nnef 0.24 gets wrong: ``addmm``, which GPT-2 is made of
    and which it cannot run, an RMSNorm without epsilon, which it gives 1e-6 instead of torch's, and casts
    that change nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every function of torch."""
        if _is_no_cast(func, args, kwargs):
            return args[0]
        if func is torch.addmm and not kwargs:
            bias, left, right = args
            return left @ right + bias
        if func in (torch.rms_norm, F.rms_norm):
            args, kwargs = _rms_norm(*args, **(kwargs or {})), None
        return func(*args, **(kwargs or {}))


def _is_no_cast(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a tensor is cast to the dtype that it has: the tracer would take its every later use, also
    outside of the module, for one of the cast's result."""
    if kwargs or func not in (Tensor.float, Tensor.to):
        return False
    wanted = (torch.float32,) if func is Tensor.float else args[1:]
    return wanted == (args[0].dtype,)


def _rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Any, ...]:
    return x, normalized_shape, weight, torch.finfo(torch.float32).eps if eps is None else eps


@contextlib.contextmanager
def no_download() -> Iterator[None]:
    """Keep torch_to_nnef from fetching tract's command line, which only its own check would use."""
    download = TractCli.__dict__["download"]
    stand_in = staticmethod(lambda version: SimpleNamespace(tract_path=Path(os.devnull), version=version))
    TractCli.download = stand_in
    try:
        yield
    finally:
        TractCli.download = download
