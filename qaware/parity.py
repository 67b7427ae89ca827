"""Does the artifact compute what the converted model computes?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qaware.engines.base import ActivationRange
from qaware.engines.static_integer import INT8
from qaware.errors import ParityError
from qaware.exporters.base import Tolerance
from qaware.parity_levels import DEFAULT, LEVELS

# How far float32 values may be from a grid that they are on, in steps; float32 is exact to 1e-5 there.
_OFF_GRID = 1e-3


@dataclass(frozen=True)
class Parity:
    """The distance between a runner and its reference over some inputs."""

    relative: float
    """Mean absolute difference over the standard deviation of the reference output."""
    max_abs: float
    """Largest absolute difference; reported, not gated: one activation that rounds otherwise is enough."""
    kl: float
    """Mean KL(reference || runner) over the last axis, in nats."""
    top1: float
    """Share of positions with the same largest output."""
    inputs: int
    steps: float | None = None
    """Largest difference in quantization steps; None where the output is on no int8 grid."""
    differing: float | None = None
    """Share of the values that are another integer; None as ``steps``."""
    far: float | None = None
    """Share of the values that are more than one step off; None as ``steps``."""
    level: str = DEFAULT
    """Of :mod:`qaware.parity_levels`; another than ``default`` stands in for the runtime's tolerance."""
    beyond: float | None = None
    """Share of the values that are further off than ``level`` allows; None for ``default``."""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether all gated figures hold; NaN never does."""
        if self.beyond is not None:
            return self.beyond <= LEVELS[self.level].outliers
        return self.within_own(tolerance)

    def within_own(self, tolerance: Tolerance) -> bool:
        """Whether the figures hold that are gated at the level ``default``."""
        close = self.relative <= tolerance.relative and self.kl <= tolerance.kl
        return close and self.within_steps(tolerance)

    def within_steps(self, tolerance: Tolerance) -> bool:
        """Whether the integers of the output are close enough, where it has any."""
        if self.steps is None or self.far is None or tolerance.steps is None:
            return True
        return self.steps <= tolerance.steps or self.far <= tolerance.stray

    def require(self, what: str, tolerance: Tolerance) -> None:
        """Raise unless within ``tolerance``.

        Raises:
            ParityError: names the artifact, the figures and the tolerance.
        """
        if not self.within(tolerance):
            raise ParityError(
                f"{what}: does not compute what the converted model computes "
                f"({self._beyond()}{self._in_steps(tolerance)}"
                f"relative difference {self.relative:.2e}, at most {tolerance.relative:.0e} allowed; "
                f"KL {self.kl:.2e} nats, at most {tolerance.kl:.0e}); "
                "the file was kept with the suffix .rejected"
            )

    def looser(self, tolerance: Tolerance) -> str | None:
        """What is to be told where ``level`` let pass what the runtime's own tolerance would not."""
        if self.within_own(tolerance) or not self.within(tolerance):
            return None
        return (
            f"parity: {self.level} is looser than this runtime's own tolerance, which is missed ("
            f"{self._in_steps(tolerance)}relative difference {self.relative:.2e}, at most "
            f"{tolerance.relative:.0e}; KL {self.kl:.2e} nats, at most {tolerance.kl:.0e})"
        )

    def _beyond(self) -> str:
        if self.beyond is None:
            return ""
        level = LEVELS[self.level]
        return (
            f"{self.beyond:.2%} of the values are more than {level.atol:g} + {level.rtol:g} * |expected| "
            f"off, at most {level.outliers:.2%} allowed by parity: {self.level}; "
        )

    def _in_steps(self, tolerance: Tolerance) -> str:
        if self.steps is None or self.differing is None or self.far is None:
            return ""
        differ = f"{self.differing:.2%} of the values differ, {self.far:.2%} by more than one step"
        allowed = "" if tolerance.steps is None else f", at most {tolerance.stray:.0%} allowed"
        return f"up to {self.steps:g} quantization steps, {differ}{allowed}; "

    def to_dict(self) -> dict[str, Any]:
        """Plain data for rows and sidecars."""
        return dataclasses.asdict(self)


@torch.no_grad()
def compare(
    runner: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[tuple[Tensor, ...]],
    grids: Iterable[ActivationRange] = (),
    level: str = DEFAULT,
) -> Parity:
    """Run both on every input.

    Args:
        runner: an artifact on its runtime.
        reference: the converted model with the same positional signature, on the CPU.
        inputs: tuples of positional tensors.
        grids: on which the output may be; where it is on one, its steps are counted.
        level: see :mod:`qaware.parity_levels`.
    """
    pairs = [(reference(*args).float(), runner(*args).float()) for args in inputs]
    for expected, got in pairs:
        if expected.shape != got.shape:
            raise ParityError(f"output: shape is {tuple(got.shape)}, the model gives {tuple(expected.shape)}")
    rows = [(_rows(expected), _rows(got)) for expected, got in pairs]
    difference = torch.cat([(e - g).abs().flatten() for e, g in rows])
    values, found = (torch.cat([row[i].flatten() for row in rows]) for i in (0, 1))
    steps, differing, far = _count_steps(difference, output_step(values, grids))
    return Parity(
        relative=float(difference.mean() / values.std().clamp_min(1e-12)),
        max_abs=float(difference.max()),
        kl=float(torch.cat([_kl(e, g) for e, g in rows]).mean()),
        top1=float(torch.cat([e.argmax(-1) == g.argmax(-1) for e, g in rows]).double().mean()),
        inputs=len(pairs),
        steps=steps,
        differing=differing,
        far=far,
        level=level,
        beyond=None if level == DEFAULT else LEVELS[level].beyond(values, found),
    )


def output_step(values: Tensor, grids: Iterable[ActivationRange]) -> float | None:
    """The step of the grid that all of ``values`` (float64, any shape) are on; None where they are on none,
    or all zero, which every grid has."""
    if not bool(values.any()):
        return None
    found = [grid.scale for grid in grids if _on_grid(values, grid)]
    return max(found, default=None)


def _on_grid(values: Tensor, grid: ActivationRange) -> bool:
    integers = values / grid.scale + grid.zero_point
    inside = bool(((integers > INT8[0] - 0.5) & (integers < INT8[1] + 0.5)).all())
    return inside and float((integers - integers.round()).abs().max()) < _OFF_GRID


def _count_steps(difference: Tensor, step: float | None) -> tuple[float | None, float | None, float | None]:
    if step is None:
        return None, None, None
    # Rounded, since the values of two equal integers may differ in their last bits.
    steps = (difference / step * 100).round() / 100
    differing, far = ((~(steps < bound)).double().mean() for bound in (0.5, 1.5))
    return float(steps.max()), float(differing), float(far)


def _rows(output: Tensor) -> Tensor:
    """float64 (rows, classes), whose number may differ from input to input; one axis is one value a row."""
    wide = output if output.dim() > 1 else output.reshape(-1, 1)
    return wide.reshape(-1, wide.shape[-1]).double()


def _kl(expected: Tensor, got: Tensor) -> Tensor:
    log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
