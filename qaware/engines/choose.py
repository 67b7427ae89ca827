"""Which engine prepares a model: by what the recipe asks for, and by the runtimes that it ships to.

One recipe serves all. Weights alone, and ranges measured at run time, are the ``modules`` engine's.
Integer activations and convolutions are the ``eager`` engine's, whose rounding every runtime can hold, or,
for ExecuTorch or AOTInductor alone, the ``graph`` engine's with that runtime's own quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qaware.adapters import from_peft
from qaware.engines.example import Example
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.matching import CONVOLUTIONS
from qaware.plan import Plan
from qaware.sharded import is_sharded

ENGINES = ("auto", "modules", "eager", "graph")
_GRAPH_RUNTIMES = ("executorch", "aoti")


@dataclass(frozen=True)
class Choice:
    """An engine and why it is the one."""

    engine: str
    reason: str


def choose(
    plan: Plan, model: nn.Module, runtimes: Sequence[str], wanted: str = "auto", training: bool = False
) -> Choice:
    """The engine for ``plan``.

    Args:
        plan: made for ``model``.
        model: float.
        runtimes: names of the exporters.
        wanted: one of ``ENGINES``.
        training: whether it is for quantization-aware training.

    Raises:
        QawareError: the wanted engine cannot do it.
    """
    convolutions = [d.module for d in plan.quantized.values() if d.type in CONVOLUTIONS]
    static = any(d.scheme and d.scheme.is_static for d in plan.quantized.values())
    if wanted == "modules" and convolutions:
        raise QawareError(
            f"engine: 'modules' has no convolutions ({convolutions[0]}); use engine: eager, or auto"
        )
    if wanted == "graph":
        _require_graph_runtime(runtimes)
        if plan.recipe.rounds and not training:
            raise QawareError(
                f"engine: 'graph' rounds to nearest only, recipe says rounding: {plan.recipe.rounding!r}; "
                "use engine: eager, or auto"
            )
    if any(is_sharded(m) for m in model.modules()) and (convolutions or wanted in ("eager", "graph")):
        raise QawareError(
            "strategy: integer activations and convolutions are not trained in sharded modules (FSDP2); use "
            "DDP, or engine: modules for a model of linear layers"
        )
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if not (static or convolutions):
        return Choice("modules", "weights, and ranges measured at run time")
    if not convolutions and (obstacle := _unlaid(plan, model, runtimes)):
        return Choice("modules", obstacle)
    alone = len(runtimes) == 1 and runtimes[0] in _GRAPH_RUNTIMES
    plain = plan.recipe.learning == "none" if training else not plan.recipe.rounds
    if static and alone and not has_stubs(model) and plain:
        return Choice("graph", f"{runtimes[0]} alone, by the quantizer that is made for it")
    return Choice("eager", f"integers that {', '.join(runtimes)} hold alike" if runtimes else "integers")


def has_stubs(model: nn.Module) -> bool:
    """Whether the model has QuantStubs of its own."""
    return any(
        type(m).__name__ == "QuantStub" and type(m).__module__.startswith("torch.") for m in model.modules()
    )


def lay_out(
    plan: Plan,
    model: nn.Module,
    find_example: Callable[[], Example],
    runtimes: Sequence[str],
    wanted: str = "auto",
    training: bool = False,
) -> tuple[Plan, Choice]:
    """The plan with its engine's layout, and the engine. Layers that it cannot take are float in the plan,
    with the reason. Under ``auto`` a model that the first choice cannot take goes to the next.

    Args:
        plan: made for ``model``.
        model: float, in evaluation mode; runs once on the example where activations are to be integers.
        find_example: gives the example; called only where it is needed.
        runtimes: names of the exporters.
        wanted: one of ``ENGINES``.
        training: whether it is for quantization-aware training.

    Raises:
        QawareError: no engine that may be used can take the model, or a layer its scheme.
    """
    choice = choose(plan, model, runtimes, wanted, training)
    if choice.engine == "modules":
        return plan, choice
    needed = plan.needs_calibration or choice.engine == "graph"
    following = _following(plan, choice.engine, runtimes) if wanted == "auto" else None
    try:
        example = find_example() if needed else Example()
        laid = _laid_out(choice.engine, model, plan, example, runtimes, training)
    except QawareError as error:
        reason = f"{choice.engine} cannot take the model: {error}"
        if following is None:
            raise
        if following == "modules":
            return plan, Choice("modules", reason)
        return _laid_out("eager", model, plan, example, runtimes, training), Choice("eager", reason)
    lost = [name for name in plan.quantized if name not in laid.quantized]
    if lost and following == "eager":
        other = _laid_out("eager", model, plan, example, runtimes, training)
        if len(other.quantized) > len(laid.quantized):
            return other, Choice("eager", f"graph would leave {', '.join(lost[:3])} in float")
    return laid, choice


def _following(plan: Plan, engine: str, runtimes: Sequence[str]) -> str | None:
    """The engine to try after ``engine``."""
    if engine == "graph":
        return "eager"
    whole = any(d.type in CONVOLUTIONS for d in plan.quantized.values()) or "executorch" in runtimes
    return None if whole else "modules"


def _laid_out(
    engine: str, model: nn.Module, plan: Plan, example: Example, runtimes: Sequence[str], training: bool
) -> Plan:
    if engine == "eager":
        from qaware.engines.eager import EagerEngine

        return EagerEngine().lay_out(model, plan, example)
    from qaware.engines.graph import GraphEngine

    laid: Plan = GraphEngine().lay_out(model, plan, example, runtimes[0], training)
    return laid


def engine_for(plan: Plan) -> Any:
    """The engine that a plan's layout is of."""
    if plan.layout is None:
        return ModulesEngine()
    if plan.layout.engine == "graph":
        from qaware.engines.graph import GraphEngine

        return GraphEngine()
    from qaware.engines.eager import EagerEngine

    return EagerEngine()


def _require_graph_runtime(runtimes: Sequence[str]) -> None:
    if len(runtimes) != 1 or runtimes[0] not in _GRAPH_RUNTIMES:
        raise QawareError(
            f"engine: 'graph' quantizes for one of {', '.join(_GRAPH_RUNTIMES)}, export has "
            f"{', '.join(runtimes) or 'none'}; use engine: eager for several"
        )


def _unlaid(plan: Plan, model: nn.Module, runtimes: Sequence[str]) -> str | None:
    """Why a model of linear layers is not laid out, so that only what enters a layer is rounded."""
    if any(d.type == "Embedding" for d in plan.quantized.values()) and "executorch" not in runtimes:
        return "a language model: what enters each linear layer is rounded, all else is float"
    if any(is_sharded(m) or from_peft(m) for m in model.modules()):
        return "sharded or adapted layers: what enters each of them is rounded, all else is float"
    if any(p.is_meta for p in model.parameters()):
        return "a model without data yet: what enters each linear layer is rounded, all else is float"
    return None
