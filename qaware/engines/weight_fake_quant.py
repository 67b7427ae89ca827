"""Fake-quantizers of weights: integers, by torchao's ``IntxFakeQuantizer`` with ranges of their own, and
float16 storage, which torchao has none for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
from torchao.quantization.quant_primitives import choose_qparams_affine_with_min_max

from qaware.engines.frozen import Kept
from qaware.engines.levels import fake_quantize, own_scale, quantize, rounding_range, soften
from qaware.engines.straight_through import round_clipped
from qaware.scheme import Scheme

# The reciprocal of a smaller scale is infinite in float16, and makes NaN of a row of zeros.
_SMALLEST_FLOAT16 = 2.0**-15

_SMALLEST_SHARE = 2.0**-12
_SMALLEST_KERNEL_SCALE = 1e-30
"""Below it a weight is nothing but zeros."""


class Marked(nn.Module):
    """A weight's fake-quantizer has one buffer: without any, the checkpoint of a prepared model would have
    the keys of the float model, and load into one without a word. A float, so that it can be averaged."""

    bits: Tensor
    config: Any
    enabled: bool

    def mark(self, bits: int) -> None:
        """Make the buffer."""
        self._bits = bits
        self.register_buffer("bits", torch.tensor(float(bits)))

    def reset_parameters(self) -> None:
        """Fill the buffer after it was materialized from the meta device."""
        self.bits.fill_(self._bits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The other way round, float weights may be loaded into a prepared model."""
        state_dict.setdefault(f"{prefix}bits", self.bits)
        super()._load_from_state_dict(state_dict, prefix, *args)


class WeightFakeQuantizer(Marked, IntxFakeQuantizer):
    """Integer fake-quantization of a weight (rows, width).

    The ranges are chosen here: torchao's fake-quantizer takes the zero point of an asymmetric weight
    from the float domain of another kernel (tinygemm), where it rounds to 0 or overflows an int8.
    """

    def __init__(self, scheme: Scheme, narrow: bool = False) -> None:
        """
        Args:
            scheme: the weight's.
            narrow: leave out the smallest integer of a symmetric weight. Where activations are integers
                too, kernels of some CPUs add two products in 16 bits, and -128 times -128 twice does not
                fit.
        """
        granularity = PerGroup(scheme.group_size) if scheme.group_size else PerAxis(0)
        precision = getattr(torch, scheme.scale_dtype)
        super().__init__(
            IntxFakeQuantizeConfig(
                integer_dtype(scheme),
                granularity,
                is_symmetric=scheme.symmetric,
                scale_precision=precision,
                is_dynamic=False,
                eps=_SMALLEST_FLOAT16 if precision == torch.float16 else None,
            )
        )
        self.scheme = scheme
        self.narrow = narrow
        self.integers = rounding_range(scheme, narrow)
        self.fixed: tuple[Tensor, Tensor] | None = None
        """Scale and zero point that a rounding method has chosen, each (rows, width / block), instead of
        those that follow from the weight; see :mod:`qaware.rounding`."""
        self.learned: Any = None
        """What trains scale and zero point, a :class:`qaware.engines.learned.LearnedGrid`, or None."""
        self.softness: Tensor | None = None
        """While the rounding is annealed, how much is left of what it takes away, a scalar; see
        :func:`qaware.engines.levels.soften`. A tensor: a compiled forward pass takes numbers for fixed."""
        self._rounded, self._grid = Kept(), Kept()
        self.mark(scheme.bits)

    def forward(self, x: Tensor, grid: Tensor | None = None, unit: Tensor | None = None) -> Tensor:
        """Same shape and dtype as ``x``, which is clipped to the range of ``grid`` where one is given:
        scale and zero point are chosen for that tensor then, not for ``x``. Learned scales are multiplied
        by ``unit`` (rows, 1)."""
        if not self.enabled:
            return x + self.learned.idle().to(x.dtype) if self._waits() else x
        if grid is None and self.learned is None and self.softness is None:
            values = self._rounded.of(x, (self.fixed,), lambda: self._hard(x, x, unit))
            hard, self.scale, self.zero_point = values
            return hard  # type: ignore[no-any-return]
        hard, self.scale, self.zero_point = self._hard(x, x if grid is None else grid, unit)
        return self._softened(x, hard)

    @property
    def by_row(self) -> bool:
        """Whether :meth:`of_rows` is there: something is rounded, and each row without the others."""
        apart = self.learned is None and self.softness is None
        return self.enabled and apart and not self.scheme.per_tensor and not self.narrow

    def of_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """``forward`` for some rows of the weight.

        Args:
            x: the rows (looked up, width).
            index: int64 (looked up,), where they are in the weight.
        """
        scale, zero_point = self.chosen(x) if self.fixed is None else (each[index] for each in self.fixed)
        return fake_quantize(x, scale, zero_point, self.scheme, self.integers)

    def with_clipped(self, x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` of an ``x`` without a gradient, and which of its values are beyond the range of the
        integers, int64 indices into the flat ``x``. For evenly spaced levels."""
        self.scale, self.zero_point = self._qparams(grid)
        hard, clipped = round_clipped(x, self.scale, self._offset(), *self.integers)
        return self._softened(x, hard), clipped

    def _softened(self, x: Tensor, hard: Tensor) -> Tensor:
        if self.softness is None:
            return hard
        return soften(x, hard, self.scale, self.softness, self.scheme.level_set)

    def _hard(self, x: Tensor, grid: Tensor, unit: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` rounded, scale and zero point."""
        scale, zero_point = self._qparams(grid, unit)
        hard = fake_quantize(x, scale, zero_point, self.scheme, self.integers)
        # What is kept is copied with the model, which nothing in an autograd graph can be.
        return hard, scale.detach(), zero_point.detach()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> WeightFakeQuantizer:
        self._rounded.clear()
        self._grid.clear()
        super()._apply(fn, recurse)
        return self

    def to_integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The integers that ship of ``x``, int8 (rows, width), on the grid of the last forward pass, and
        their scale, float32 (rows, width / block)."""
        return quantize(x, self.scale, self.zero_point, self.scheme, self.integers)

    def _waits(self) -> bool:
        return self.learned is not None and torch.is_grad_enabled()

    def _qparams(self, x: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point, each (rows, width / block)."""
        if self.fixed is not None:
            return self.fixed
        if self.learned is not None:
            learned: tuple[Tensor, Tensor] = self.learned.qparams(x, self, unit)
            return learned
        scale, zero_point = self._grid.of(x, (), lambda: self.chosen(x))
        return scale, zero_point

    def _offset(self) -> Tensor | None:
        return None if self.scheme.symmetric else self.zero_point

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (int32) that follow from ``x``, each (rows, width / block)."""
        config = self.config
        if self.scheme.levels != "all":
            rows = x.reshape(1, -1) if self.scheme.per_tensor else x
            scale = self.legal(own_scale(rows, self.scheme)).expand(len(x), -1)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        blocks = x.detach().reshape(
            (1, 1, -1) if self.scheme.per_tensor else (len(x), -1, self.scheme.block(x.shape[1]))
        )
        with torch.no_grad():
            # torchao's arithmetic without its operator, which takes longer than all that it calls.
            scale, zero_point = choose_qparams_affine_with_min_max(
                blocks.amin(-1),
                blocks.amax(-1),
                config.mapping_type,
                (),
                torch.int8,
                *self.integers,
                config.eps,
                config.scale_precision,
                torch.int32,
            )
        scale = _not_dead(scale) if self.narrow else scale
        return scale.expand(len(x), -1), zero_point.expand(len(x), -1)

    def legal(self, scale: Tensor) -> Tensor:
        """``scale`` in the precision that ships, neither zero nor too small for the kernels."""
        smallest = self.config.eps or torch.finfo(torch.float32).eps
        scale = scale.clamp(min=smallest).to(self.config.scale_precision)
        return _not_dead(scale) if self.narrow else scale


class Float16FakeQuantizer(Marked):
    """Rounds to float16 and back; the gradient passes through (straight-through estimator)."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.mark(16)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        if not self.enabled:
            return x
        return x + (x.detach().half().to(x.dtype) - x.detach())

    @property
    def by_row(self) -> bool:
        """Whether anything is rounded."""
        return self.enabled

    def of_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """``forward`` for some rows of the weight, wherever they are."""
        return self(x)  # type: ignore[no-any-return]


def weight_fake_quantizer(scheme: Scheme) -> nn.Module:
    """The fake-quantizer of a weight (rows, width)."""
    if scheme.is_float:
        return Float16FakeQuantizer()
    return WeightFakeQuantizer(scheme)


def integer_dtype(scheme: Scheme) -> torch.dtype:
    """torch.int1 to torch.int8: the name of the range of the integers that ship, not the storage."""
    dtype: torch.dtype = getattr(torch, f"int{scheme.stored_bits}")
    return dtype


def _not_dead(scale: Tensor) -> Tensor:
    """Scales of at least a part of the largest: a channel of zeros has none of its own, and that of nearly
    zeros is one that runtimes refuse, or in whose units a bias is no int32. What leaves such a channel is
    less than a step of the integers that all channels share."""
    largest = scale.detach().max()
    floor = torch.where(largest > _SMALLEST_KERNEL_SCALE, largest * _SMALLEST_SHARE, _SMALLEST_SHARE)
    return torch.maximum(scale, floor.to(scale.dtype))
