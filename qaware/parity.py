"""Does the artifact compute what the converted model computes?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qaware.errors import ParityError
from qaware.exporters.base import Tolerance


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

    def within(self, tolerance: Tolerance) -> bool:
        """Whether both gated figures hold; NaN never does."""
        return self.relative <= tolerance.relative and self.kl <= tolerance.kl

    def require(self, what: str, tolerance: Tolerance) -> None:
        """Raise unless within ``tolerance``.

        Raises:
            ParityError: names the artifact, both figures and the tolerance.
        """
        if not self.within(tolerance):
            raise ParityError(
                f"{what}: does not compute what the converted model computes (relative difference "
                f"{self.relative:.2e}, at most {tolerance.relative:.0e} allowed; KL {self.kl:.2e} nats, "
                f"at most {tolerance.kl:.0e}); the file was kept with the suffix .rejected"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for rows and sidecars."""
        return dataclasses.asdict(self)


@torch.no_grad()
def compare(
    runner: Callable[..., Tensor], reference: nn.Module, inputs: Sequence[tuple[Tensor, ...]]
) -> Parity:
    """Run both on every input.

    Args:
        runner: an artifact on its runtime.
        reference: the converted model with the same positional signature, on the CPU.
        inputs: tuples of positional tensors.
    """
    pairs = [(reference(*args).float(), runner(*args).float()) for args in inputs]
    for expected, got in pairs:
        if expected.shape != got.shape:
            raise ParityError(f"output: shape is {tuple(got.shape)}, the model gives {tuple(expected.shape)}")
    rows = [(_rows(expected), _rows(got)) for expected, got in pairs]
    difference = torch.cat([(e - g).abs().flatten() for e, g in rows])
    spread = torch.cat([e.flatten() for e, _ in rows]).std()
    return Parity(
        relative=float(difference.mean() / spread.clamp_min(1e-12)),
        max_abs=float(difference.max()),
        kl=float(torch.cat([_kl(e, g) for e, g in rows]).mean()),
        top1=float(torch.cat([e.argmax(-1) == g.argmax(-1) for e, g in rows]).double().mean()),
        inputs=len(pairs),
    )


def _rows(output: Tensor) -> Tensor:
    """float64 (rows, classes), whose number may differ from input to input; one axis is one value a row."""
    wide = output if output.dim() > 1 else output.reshape(-1, 1)
    return wide.reshape(-1, wide.shape[-1]).double()


def _kl(expected: Tensor, got: Tensor) -> Tensor:
    log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
