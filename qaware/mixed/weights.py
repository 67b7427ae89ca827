"""The weights of a plan as they are stored: tied layers on one grid are one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qaware.engines.base import QuantizedWeight, packed_bytes
from qaware.plan import Decision, Plan
from qaware.scheme import Scheme

Schemes = tuple[Scheme, ...]
"""One for each layer of a stored weight; they differ in their activations only."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight as it ships, with all the layers that read it."""

    decisions: tuple[Decision, ...]
    """Of the layers, each with its scheme."""

    @property
    def names(self) -> tuple[str, ...]:
        """Module names."""
        return tuple(decision.module for decision in self.decisions)

    @property
    def label(self) -> str:
        """For tables: the first layer, and those that are tied to it."""
        return " = ".join(self.names)

    @property
    def schemes(self) -> Schemes:
        """As the plan has them."""
        return tuple(d.scheme for d in self.decisions if d.scheme is not None)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.decisions[0].numel

    def bytes(self, schemes: Schemes) -> int:
        """Packed size of integers, scales and zero points under ``schemes``, as a converted model has it."""
        scheme, first = schemes[0].weight, self.decisions[0]
        rows = first.shape[0]
        data = torch.empty(rows, first.width, dtype=torch.int8, device="meta")
        blocks = torch.empty(rows, first.width // scheme.block(first.width), device="meta")
        scale = None if scheme.is_float else blocks[:1, :1] if scheme.per_tensor else blocks
        return packed_bytes(QuantizedWeight(data, scale, None if scheme.symmetric else blocks, scheme))


def stored_weights(plan: Plan) -> list[StoredWeight]:
    """What a plan quantizes, in the model's order. Layers that are tied, but have grids of their own, ship a
    weight each. A group that does not divide a layer is no obstacle here."""
    found: dict[tuple[str, Scheme, bool], list[Decision]] = {}
    for decision in plan.decisions:
        if decision.scheme is not None and decision.obstacle is None:
            key = decision.tied_to or decision.parameter, decision.scheme.weight, decision.scheme.per_tensor
            found.setdefault(key, []).append(decision)
    return [StoredWeight(tuple(decisions)) for decisions in found.values()]


def assigned(plan: Plan, schemes: Mapping[str, Scheme]) -> Plan:
    """``plan`` with these schemes by module name, and everything else in float."""

    def decide(decision: Decision) -> Decision:
        scheme = schemes.get(decision.module) if decision.scheme is not None else None
        reason = "measured with this scheme" if scheme else "float while another layer is measured"
        return dataclasses.replace(decision, scheme=scheme, reason=reason, problem=None)

    return Plan(plan.recipe, tuple(map(decide, plan.decisions)))
