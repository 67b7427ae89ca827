"""The ``graph`` engine: a model exported as a graph and rounded where its runtime rounds (torchao's PT2E)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.example import Example
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.graph_build import adopt, as_program, layer_sites, make_graph, rounded_layers
from qaware.engines.graph_integers import fix_ranges, to_integers
from qaware.engines.graph_module import Graphed, become_graph, graph_data
from qaware.engines.graph_quantizers import TARGETS, the_scheme
from qaware.engines.graph_trace import describe
from qaware.errors import QawareError
from qaware.layout import Layout
from qaware.plan import Plan


class GraphEngine:
    """Prepare and convert linear layers and convolutions in an exported graph, for one runtime."""

    name = "graph"

    def lay_out(self, model: nn.Module, plan: Plan, example: Example, target: str, training: bool) -> Plan:
        """``plan`` with what :meth:`prepare` needs, and without the layers that the runtime keeps float.

        Args:
            model: float; not changed.
            plan: a recipe matched against ``model``.
            example: one batch of inputs; the batch may have any size later, the other axes are fixed.
            target: ``executorch`` or ``aoti``.
            training: whether the prepared model will be trained.

        Raises:
            QawareError: the model cannot be exported, or the runtime has no kernels for the scheme.
        """
        plan.require_possible()
        if target not in TARGETS:
            raise QawareError(f"target: {target!r} has no graph engine; use one of {', '.join(TARGETS)}")
        the_scheme(plan, target)
        _refuse_dtype(model, plan)
        data = {"target": target, "training": training, "inputs": describe(model, example)}
        laid_out = dataclasses.replace(plan, layout=Layout(self.name, graph=data))
        made = make_graph(model, laid_out)
        kept = _without_float(laid_out, made)
        return kept.with_layout(Layout(self.name, layer_sites(made), graph=data))

    def prepare(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Make the forward of ``model`` a graph with fake-quantizers, in place; no example is needed.

        Raises:
            QawareError: the plan has no layout, or the model is another than it was made for.
        """
        if isinstance(model, Graphed):
            return model
        made = make_graph(model, plan)
        lost = plan.quantized.keys() - rounded_layers(made)
        if lost:
            raise QawareError(
                f"{', '.join(sorted(lost))}: not in the graph of this model; make the plan anew"
            )
        adopt(model, made)
        become_graph(model, as_program(plan, made))
        return model

    def convert(self, model: nn.Module, plan: Plan) -> QuantizedModel:
        """Make the forward of a prepared ``model`` a graph of integers, in place, in evaluation mode.

        Layers keep their names and hold what they ship: ``weight`` int8 in the layer's shape,
        ``weight_scale`` and ``weight_zero_point`` (rows,), ``bias`` with the batch norm folded into it;
        folded batch norms become identities.

        Raises:
            QawareError: the model is not prepared, was cast to another precision, or a range was never
                observed.
        """
        if not isinstance(model, Graphed):
            raise QawareError(f"{type(model).__name__}: is not prepared; call prepare() before convert()")
        _refuse_dtype(model, plan)
        set_fake_quant(model.eval(), True)
        return to_integers(model, plan)

    def rebuild(
        self,
        model: nn.Module,
        plan: Plan,
        weights: dict[str, QuantizedWeight],
        activations: dict[str, ActivationRange],
        outputs: dict[str, ActivationRange],
    ) -> QuantizedModel:
        """The converted model from what was kept; the float ``model`` changes in place. Its folded batch
        norms are identities already, and its layers have the shipped biases."""
        graph = {**graph_data(plan), "training": False}
        layout = Layout(self.name, graph=graph)
        self.prepare(model.eval(), dataclasses.replace(plan, layout=layout))
        fix_ranges(model, activations, outputs)
        return to_integers(model, plan, weights)


def set_batch_norm_training(model: nn.Module, training: bool) -> None:
    """Switch the batch norms of a float or prepared model, whatever mode the rest is in; with ``False`` they
    keep their statistics, and training computes what evaluation does."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(training)


def _without_float(plan: Plan, prepared: GraphModule) -> Plan:
    """The layers that the runtime's quantizer left out become float decisions, with the reason."""
    target = graph_data(plan)["target"]
    lost = plan.quantized.keys() - rounded_layers(prepared)
    reason = f"has no int8 form in a graph for {target} where it is called; engine: eager may have one"
    decisions = [
        dataclasses.replace(d, scheme=None, reason=reason) if d.module in lost and d.scheme else d
        for d in plan.decisions
    ]
    if len(lost) == len(plan.quantized):
        raise QawareError(f"{', '.join(sorted(lost))}: {reason}")
    return dataclasses.replace(plan, decisions=tuple(decisions))


def _refuse_dtype(model: nn.Module, plan: Plan) -> None:
    modules: dict[str, Any] = dict(model.named_modules())
    for name in plan.quantized:
        if modules[name].weight.dtype != torch.float32:
            raise QawareError(
                f"{name}: weight is {modules[name].weight.dtype}; integer kernels give float32, so keep the "
                "model in float32 (precision: 32, or bf16-mixed to train), or use engine: eager"
            )
