"""A ``.tflite`` function has fixed sizes: how it takes inputs of any legal size.

Where the first axis of all inputs is a dynamic one, its rows are run one by one. Along any other dynamic
axis, inputs are padded with zeros at the end up to the largest legal size, and outputs are cut: right for a
causal language model, and for all else that never looks ahead. Whether a model stands it is tried before it
is converted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.signature import Signature

_NOISE = 0.01
"""Mean difference over the standard deviation: an activation near an edge may round to the next integer."""


@dataclass(frozen=True)
class Sizes:
    """Of one function."""

    rows: str | None
    """The dynamic first axis, run one row at a time."""
    padded: dict[str, int]
    """Size in the file of every other dynamic axis."""
    cut: tuple[tuple[int, str], ...]
    """Axes of the output that follow one of these."""

    def pad(self, tensors: Sequence[Tensor], signature: Signature) -> tuple[Tensor, ...]:
        """Zeros (or the smallest legal value) behind each tensor, up to the sizes of the file."""
        return tuple(
            _pad(tensor, [self.padded.get(str(size)) for size in spec.shape], spec.low or 0)
            for spec, tensor in zip(signature.inputs, tensors, strict=True)
        )

    def cut_off(self, output: Tensor, tensors: Sequence[Tensor], signature: Signature) -> Tensor:
        """``output`` without what stands for padding of ``tensors``."""
        sizes = _sizes(tensors, signature)
        for axis, symbol in self.cut:
            output = output.narrow(axis, 0, sizes[symbol])
        return output


def run_fixed(
    call: Callable[..., Tensor], sizes: Sizes, signature: Signature, tensors: Sequence[Tensor]
) -> Tensor:
    """The output for inputs of any legal size, by ``call``, which takes those of the file."""
    rows = range(len(tensors[0])) if sizes.rows else [None]
    parts = [[t if row is None else t[row : row + 1] for t in tensors] for row in rows]
    outputs = [sizes.cut_off(call(*sizes.pad(part, signature)), part, signature) for part in parts]
    return torch.cat(outputs) if sizes.rows else outputs[0]


def find_sizes(
    module: Callable[..., Tensor], example: Sequence[Tensor], signature: Signature
) -> tuple[Sizes, tuple[Tensor, ...]]:
    """How a file of ``module`` is run, and inputs of its sizes.

    Raises:
        QawareError: padding, or taking rows apart, changes what the model computes.
    """
    rows, padded = _axes(signature)
    shorter = {s: max(signature.symbols[s][0], signature.symbols[s][1] // 2) for s in padded}
    if rows:
        shorter[rows] = min(2, signature.symbols[rows][1])
    inputs = _resized(example, signature, shorter)
    with torch.no_grad():
        expected = module(*inputs)
        whole = Sizes(None, padded, ())
        full = module(*whole.pad(inputs, signature))
        cut = tuple(_followed(expected.shape, full.shape, shorter, padded))
        sizes = Sizes(rows, padded, cut)
        if not _same(run_fixed(module, sizes, signature, inputs), expected):
            raise QawareError(_why(rows, padded))
    one = _resized(example, signature, {**padded, **({rows: 1} if rows else {})})
    return sizes, tuple(t.detach().cpu().contiguous() for t in one)


def _axes(signature: Signature) -> tuple[str | None, dict[str, int]]:
    opened = [s for s, (low, high) in signature.symbols.items() if low < high]
    first = {spec.shape[0] for spec in signature.inputs if spec.shape}
    later = set(itertools.chain(*(spec.shape[1:] for spec in signature.inputs)))
    alone = len(first) == 1 and all(spec.shape for spec in signature.inputs)
    symbol = next(iter(first)) if alone else None
    rows = symbol if isinstance(symbol, str) and symbol in opened and symbol not in later else None
    return rows, {s: signature.symbols[s][1] for s in opened if s != rows}


def _resized(example: Sequence[Tensor], signature: Signature, wanted: dict[str, int]) -> tuple[Tensor, ...]:
    """The example cut, or repeated, along dynamic axes."""
    resized = []
    for spec, tensor in zip(signature.inputs, example, strict=True):
        for axis, symbol in enumerate(spec.shape):
            if isinstance(symbol, str) and symbol in wanted:
                tensor = tensor.index_select(axis, torch.arange(wanted[symbol]) % tensor.shape[axis])
        resized.append(tensor)
    return tuple(resized)


def _followed(short: Any, full: Any, shorter: dict[str, int], padded: dict[str, int]) -> Any:
    """Axes of an output whose size changed as that of a symbol did."""
    for axis, pair in enumerate(zip(short, full, strict=True)):
        if pair[0] != pair[1]:
            symbol = next((s for s in padded if pair == (shorter[s], padded[s])), None)
            if symbol is None:
                raise QawareError(_why(None, padded))
            yield axis, symbol


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    difference = (found.float() - expected.float()).abs().mean()
    spread = expected.float().std(correction=0)
    return bool(difference <= _NOISE * spread) if expected.numel() > 1 else bool(difference < _NOISE)


def _sizes(tensors: Sequence[Tensor], signature: Signature) -> dict[str, int]:
    return {
        symbol: size
        for spec, tensor in zip(signature.inputs, tensors, strict=True)
        for symbol, size in zip(spec.shape, tensor.shape, strict=True)
        if isinstance(symbol, str)
    }


def _pad(tensor: Tensor, wanted: Sequence[int | None], value: int) -> Tensor:
    ends: list[int] = []
    for size, most in zip(reversed(tensor.shape), reversed(wanted), strict=True):
        ends += [0, 0 if most is None else most - size]
    return F.pad(tensor, ends, value=value) if any(ends) else tensor


def _why(rows: str | None, padded: dict[str, int]) -> str:
    done = [f"padding {symbol!r} to {size}" for symbol, size in padded.items()]
    done += [f"taking the rows of {rows!r} one by one"] if rows else []
    return (
        f"litert: a .tflite has fixed sizes, and {' and '.join(done)} changes what this model computes; "
        "export it with fixed sizes"
    )
