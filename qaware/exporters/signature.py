"""The inputs of an exported model: what is legal, checked before a runtime sees them.

Runtimes are foreign code. tract ends the process for a token outside the vocabulary or a missing
input; ExecuTorch answers with a hexadecimal number. So inputs are checked here, in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qaware.errors import QawareError


@dataclass(frozen=True)
class TensorSpec:
    """One input."""

    name: str
    dtype: str
    """torch's name without the prefix: ``int64``, ``float32``."""
    shape: tuple[int | str, ...]
    """A size, or the name of a symbol for a dynamic axis."""
    low: int | None = None
    """Smallest legal value of an integer input."""
    high: int | None = None
    """Largest legal value of an integer input, e.g. the vocabulary size less one."""
    keyword: str | None = None
    """Set when the model takes this input as a keyword argument of that name."""


@dataclass(frozen=True)
class Signature:
    """All inputs in order, and the bounds of their dynamic axes."""

    inputs: tuple[TensorSpec, ...]
    symbols: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Smallest and largest size of each dynamic axis."""

    def validate(self, tensors: Sequence[Tensor]) -> None:
        """Check number, dtype, shape, symbol bounds and value range.

        Raises:
            QawareError: names the input, what it is and what it must be.
        """
        if len(tensors) != len(self.inputs):
            names = ", ".join(s.name for s in self.inputs)
            raise QawareError(f"inputs: got {len(tensors)}, the model takes {len(self.inputs)} ({names})")
        sizes: dict[str, int] = {}
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            self._validate_one(spec, tensor, sizes)

    def _validate_one(self, spec: TensorSpec, tensor: Tensor, sizes: dict[str, int]) -> None:
        if str(tensor.dtype) != f"torch.{spec.dtype}":
            raise QawareError(f"{spec.name}: dtype is {tensor.dtype}, must be torch.{spec.dtype}")
        shape = tuple(tensor.shape)
        if len(shape) != len(spec.shape):
            raise QawareError(f"{spec.name}: shape is {shape}, must be {spec.shape}")
        for size, wanted in zip(shape, spec.shape, strict=True):
            if isinstance(wanted, str):
                low, high = self.symbols[wanted]
                if not low <= size <= high:
                    raise QawareError(f"{spec.name}: {wanted} is {size}, must be {low} to {high}")
                wanted = sizes.setdefault(wanted, size)
            if size != wanted:
                raise QawareError(f"{spec.name}: shape is {shape}, must be {spec.shape}")
        if spec.high is not None and spec.low is not None and tensor.numel():
            least, most = int(tensor.min()), int(tensor.max())
            if least < spec.low or most > spec.high:
                bad = least if least < spec.low else most
                raise QawareError(f"{spec.name}: value {bad} is outside {spec.low} to {spec.high}")

    @property
    def longest(self) -> int:
        """The largest second axis of the first input: tokens, of a language model; 0 where it has none."""
        size = self.inputs[0].shape[1] if len(self.inputs[0].shape) > 1 else 0
        return self.symbols[size][1] if isinstance(size, str) else size

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The inputs as the model's own forward takes them: by position, and by keyword."""
        pairs = list(zip((spec.keyword for spec in self.inputs), tensors, strict=True))
        return tuple(t for k, t in pairs if k is None), {k: t for k, t in pairs if k is not None}

    def wrap(self, module: nn.Module) -> Deployable:
        """``module`` as something every exporter can trace: tensors in, one tensor out."""
        return Deployable(module, tuple(spec.keyword for spec in self.inputs))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the sidecar."""
        inputs = [
            {
                "name": s.name,
                "dtype": s.dtype,
                "shape": list(s.shape),
                "low": s.low,
                "high": s.high,
                "keyword": s.keyword,
            }
            for s in self.inputs
        ]
        return {"inputs": inputs, "symbols": {k: list(v) for k, v in self.symbols.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Signature:
        """Read back what ``to_dict`` wrote."""
        inputs = tuple(TensorSpec(**{**s, "shape": tuple(s["shape"])}) for s in data["inputs"])
        return cls(inputs, {k: (v[0], v[1]) for k, v in data["symbols"].items()})


class Deployable(nn.Module):
    """A module with positional tensors in and a single tensor out, whatever its own forward takes."""

    def __init__(self, module: nn.Module, keywords: tuple[str | None, ...]) -> None:
        super().__init__()
        self.module = module
        self.keywords = keywords

    def forward(self, *tensors: Tensor) -> Tensor:
        """The first tensor of the module's output."""
        pairs = list(zip(self.keywords, tensors, strict=True))
        args = [t for k, t in pairs if k is None]
        kwargs = {k: t for k, t in pairs if k is not None}
        return first_tensor(self.module(*args, **kwargs))


def first_tensor(output: Any) -> Tensor:
    """``logits`` of a model output or mapping, else the first tensor in it.

    Raises:
        QawareError: the output holds no tensor.
    """
    if isinstance(output, Tensor):
        return output
    items = output if isinstance(output, (list, tuple)) else ()
    if isinstance(output, Mapping):
        items = [output["logits"]] if "logits" in output else list(output.values())
    elif isinstance(getattr(output, "logits", None), Tensor):
        items = [output.logits]
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise QawareError(f"forward: returned {type(output).__name__}, which holds no tensor to export or score")


def value_range(module: nn.Module, run: Any, tensor: Tensor) -> tuple[int, int] | None:
    """Legal values of an integer input: the rows of the embedding that it goes into, found by running.

    Args:
        module: the model.
        run: calls the model on an example that contains ``tensor``.
        tensor: the integer input, by identity.
    """
    bounds: list[int] = []

    def look(embedding: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(embedding, nn.Embedding)
        ids = args[0]
        if isinstance(ids, Tensor) and ids.shape == tensor.shape and torch.equal(ids, tensor):
            bounds.append(embedding.num_embeddings)

    hooks = [m.register_forward_pre_hook(look) for m in module.modules() if isinstance(m, nn.Embedding)]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return (0, min(bounds) - 1) if bounds else None
