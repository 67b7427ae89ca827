"""The ``eager`` engine: integer weights and activations in the user's own modules and forward.

What PyTorch's eager quantization asks the user to write into the model - QuantStub and DeQuantStub, fused
modules, FloatFunctional - is found from one example batch (:mod:`qaware.engines.fusion`) and put in by
class swap, so names, hooks and ties stay. Layers without static activations are the ``modules`` engine's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qaware.engines.activation_fake_quant import StaticFakeQuantizer
from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.eager_layout import is_static, lay_out, layout_of, other_layers, own_layers
from qaware.engines.example import Example
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.modules import ModulesEngine, leave_fast_path
from qaware.engines.operations import Operation, add_operation, add_scope, remove_scope
from qaware.engines.static_convert import choose_integers, read_grids
from qaware.engines.static_integer import Requantize, become_integer_layer
from qaware.engines.static_layers import FakeQuantizedLayer, prepare_layer
from qaware.errors import QawareError
from qaware.layout import Layout
from qaware.matching import CONVOLUTIONS
from qaware.plan import Plan

_STATIC_TYPES = ("Linear", *CONVOLUTIONS)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class EagerEngine:
    """Prepare and convert models whose activations are integers, or that have convolutions."""

    name = "eager"

    def lay_out(self, model: nn.Module, plan: Plan, example: Example) -> Plan:
        """See :func:`qaware.engines.eager_layout.lay_out`."""
        return lay_out(model, plan, example)

    def prepare(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Insert observers and fake-quantizers, in place; layers that have them already stay.

        Raises:
            QawareError: the plan has no layout, or a weight's dtype has no fake-quantizer (float64).
        """
        layout = layout_of(plan)
        modules = dict(model.named_modules())
        for name, decision in own_layers(plan).items():
            _refuse_dtype(name, modules[name])
            if not isinstance(modules[name], FakeQuantizedLayer):
                site = layout.layer(name)
                norm = modules[site.batch_norm] if site is not None and site.batch_norm else None
                assert decision.scheme is not None
                prepare_layer(modules[name], decision.type, decision.scheme, site, norm)
        for scope in layout.scopes:
            add_scope(modules[scope])
        for operation in layout.operations:
            if operation.name not in modules:
                device = next((p.device for p in model.parameters()), torch.device("cpu"))
                quantizer = StaticFakeQuantizer(_observer(plan)).to(device)
                add_operation(model.get_submodule(operation.owner), operation, quantizer)
        _connect(dict(model.named_modules()), layout)
        leave_fast_path(model)
        rest = other_layers(plan)
        if rest.quantized:
            ModulesEngine().prepare(model, rest)
        for name in rest.quantized if layout.operations else ():
            add_scope(modules[name])
        return model

    def convert(self, model: nn.Module, plan: Plan) -> QuantizedModel:
        """Replace fake-quantizers by integers, in place (give it a copy), in evaluation mode.

        Raises:
            QawareError: a layer is not prepared, or a range was never observed.
        """
        modules = dict(model.named_modules())
        for name in own_layers(plan):
            if not isinstance(modules.get(name), FakeQuantizedLayer):
                raise QawareError(
                    f"{name}: is not prepared; call prepare() with the same recipe before convert()"
                )
        set_fake_quant(model.eval(), True)
        rest = other_layers(plan)
        result = QuantizedModel(model, plan, weights={})
        if rest.quantized:
            for name in rest.quantized:
                remove_scope(modules[name])
            others = ModulesEngine().convert(model, rest)
            result.weights.update(others.weights)
            result.activations.update(others.activations)
        biases = {
            name: choose_integers(name, modules[name], d, result) for name, d in own_layers(plan).items()
        }
        read_grids(modules, layout_of(plan), result)
        return self._integers(result, biases)

    def rebuild(
        self,
        model: nn.Module,
        plan: Plan,
        weights: dict[str, QuantizedWeight],
        activations: dict[str, ActivationRange],
        outputs: dict[str, ActivationRange],
    ) -> QuantizedModel:
        """The converted model from what was kept; the float ``model`` changes in place, and has been given
        the shipped biases before (see :func:`fold_shapes`)."""
        leave_fast_path(model)
        rest = other_layers(plan)
        if rest.quantized:
            ModulesEngine().rebuild(model, rest, weights, activations)
        result = QuantizedModel(model.eval(), plan, weights, activations, outputs)
        return self._integers(result, {name: model.get_submodule(name).bias for name in own_layers(plan)})

    def _integers(self, result: QuantizedModel, biases: dict[str, Any]) -> QuantizedModel:
        model, layout = result.module, layout_of(result.plan)
        fold_shapes(model, layout)
        for name, decision in own_layers(result.plan).items():
            site = layout.layer(name)
            module: Any = model.get_submodule(name)
            for child in ("weight_fake_quantizer", "activation_fake_quantizer", "output_fake_quantizer"):
                module._modules.pop(child, None)
                vars(module).pop(child, None)
            for held in ("norm", "source"):
                vars(module).pop(held, None)
            bias = None if biases[name] is None else biases[name].detach()
            grids = result.activations.get(name), result.outputs.get(name)
            relu = site is not None and site.relu
            become_integer_layer(module, decision.type, result.weights[name], bias, *grids, relu)
        for operation in layout.operations:
            owner = model.get_submodule(operation.owner)
            add_operation(owner, operation, Requantize(result.outputs[operation.name]))
        model.requires_grad_(False)
        return result


def _connect(modules: dict[str, Any], layout: Layout) -> None:
    """Tell each layer whose grid its input is on."""
    for site in layout.layers:
        if site.source is not None:
            made = modules[site.source]
            quantizer = made.quantizer if isinstance(made, Operation) else made.output_fake_quantizer
            modules[site.module].source = (quantizer,)


def fold_shapes(model: nn.Module, layout: Layout) -> None:
    """Give a model, float or prepared, the parameters that ship: folded norms have none, layers a bias."""
    for site in layout.layers:
        if site.batch_norm is not None:
            norm, layer = model.get_submodule(site.batch_norm), model.get_submodule(site.module)
            norm.__class__ = nn.Identity
            norm._parameters.clear()
            norm._buffers.clear()
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(len(layer.weight)), requires_grad=False)


def _observer(plan: Plan) -> str:
    """Of the results of functions: that of the first static layer."""
    schemes = (d.scheme for d in plan.quantized.values() if is_static(d))
    return next((s.observer for s in schemes if s is not None), "minmax")


def _refuse_dtype(name: str, module: Any) -> None:
    if module.weight.dtype not in _DTYPES:
        raise QawareError(
            f"{name}: weight is {module.weight.dtype}; quantization needs float32, bfloat16 or float16"
        )
