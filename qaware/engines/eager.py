"""The ``eager`` engine: integer weights and activations in the user's own modules and forward.

What PyTorch's eager quantization asks the user to write into the model - QuantStub and DeQuantStub, fused
modules, FloatFunctional - is found from one example batch (:mod:`qaware.engines.fusion`) and put in by
class swap, so names, hooks and ties stay. Layers without static activations are the ``modules`` engine's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.copying import deep_copy
from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.dataflow import record
from qaware.engines.example import Example
from qaware.engines.fake_quant import StaticFakeQuantizer, integer_dtype, set_fake_quant
from qaware.engines.fusion import find_layout, outside_stubs
from qaware.engines.modules import ModulesEngine
from qaware.engines.operations import Operation, add_operation, add_scope
from qaware.engines.static_integer import Requantize, become_integer_layer
from qaware.engines.static_layers import FakeQuantizedLayer, prepare_layer
from qaware.errors import QawareError
from qaware.layout import LayerSite, Layout
from qaware.matching import CONVOLUTIONS
from qaware.plan import Decision, Plan
from qaware.scheme import Scheme

_STATIC_TYPES = ("Linear", *CONVOLUTIONS)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class EagerEngine:
    """Prepare and convert models whose activations are integers, or that have convolutions."""

    name = "eager"

    def lay_out(self, model: nn.Module, plan: Plan, example: Example) -> Plan:
        """The plan with the places where ``model`` rounds its activations.

        Args:
            model: float; runs once on ``example`` in evaluation mode.
            plan: made for ``model``. Layers that the example does not reach, or that the model's own stubs
                leave out, become float in the result, with the reason.
            example: real data or random numbers; only the path that it takes through the model counts.

        Raises:
            QawareError: a layer cannot hold its scheme, or the model does not run on the example.
        """
        plan.require_possible()
        for name, decision in plan.quantized.items():
            _refuse_scheme(name, decision)
        if not plan.needs_calibration:
            return dataclasses.replace(plan, layout=Layout("eager"))
        model = deep_copy(model).eval()  # a forward may count its calls or fill a cache
        example = example.to(next((p.device for p in model.parameters()), torch.device("cpu")))
        flow = _record(model, example)
        outside = outside_stubs(flow)
        reached = {call.name for call in flow.calls if call.module is not None}
        plan = dataclasses.replace(
            plan, decisions=tuple(_reachable(d, reached, outside) for d in plan.decisions)
        )
        plan.require_possible()
        layout = find_layout(flow, {name for name, d in plan.quantized.items() if _is_static(d)})
        plan = dataclasses.replace(plan, layout=layout)
        return plan if _computes_the_same(model, plan, example) else _without_operations(plan)

    def prepare(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Insert observers and fake-quantizers, in place; layers that have them already stay.

        Raises:
            QawareError: the plan has no layout, or a weight's dtype has no fake-quantizer (float64).
        """
        layout = _layout(plan)
        modules = dict(model.named_modules())
        for name, decision in _own(plan).items():
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
        rest = _rest(plan)
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
        for name in _own(plan):
            if not isinstance(modules.get(name), FakeQuantizedLayer):
                raise QawareError(
                    f"{name}: is not prepared; call prepare() with the same recipe before convert()"
                )
        set_fake_quant(model.eval(), True)
        rest = _rest(plan)
        result = QuantizedModel(model, plan, weights={})
        if rest.quantized:
            others = ModulesEngine().convert(model, rest)
            result.weights.update(others.weights)
            result.activations.update(others.activations)
        biases = {name: _shipped(name, modules[name], d, result) for name, d in _own(plan).items()}
        _observed(modules, _layout(plan), result)
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
        rest = _rest(plan)
        if rest.quantized:
            ModulesEngine().rebuild(model, rest, weights, activations)
        result = QuantizedModel(model.eval(), plan, weights, activations, outputs)
        return self._integers(result, {name: model.get_submodule(name).bias for name in _own(plan)})

    def _integers(self, result: QuantizedModel, biases: dict[str, Any]) -> QuantizedModel:
        model, layout = result.module, _layout(result.plan)
        fold_shapes(model, layout)
        for name, decision in _own(result.plan).items():
            site = layout.layer(name)
            module: Any = model.get_submodule(name)
            for child in ("weight_fake_quantizer", "activation_fake_quantizer", "output_fake_quantizer"):
                module._modules.pop(child, None)
                vars(module).pop(child, None)
            vars(module).pop("norm", None)
            bias = None if biases[name] is None else biases[name].detach()
            grids = result.activations.get(name), result.outputs.get(name)
            relu = site is not None and site.relu
            become_integer_layer(module, decision.type, result.weights[name], bias, *grids, relu)
        for operation in layout.operations:
            owner = model.get_submodule(operation.owner)
            add_operation(owner, operation, Requantize(result.outputs[operation.name]))
        model.requires_grad_(False)
        return result


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


def _own(plan: Plan) -> dict[str, Decision]:
    """The layers that are this engine's: with integer activations, and convolutions."""
    return {n: d for n, d in plan.quantized.items() if _is_static(d) or d.type in CONVOLUTIONS}


def _rest(plan: Plan) -> Plan:
    """The plan of the layers that the ``modules`` engine prepares."""
    own = _own(plan)
    return Plan(plan.recipe, tuple(d for d in plan.decisions if d.module not in own))


def _is_static(decision: Decision) -> bool:
    return bool(decision.scheme and decision.scheme.is_static and decision.type in _STATIC_TYPES)


def _layout(plan: Plan) -> Layout:
    if plan.layout is None:
        raise QawareError(
            f"recipe {plan.recipe.name!r}: the eager engine needs the layout of an example batch; "
            "call EagerEngine().lay_out(model, plan, example) first"
        )
    return plan.layout


def _observer(plan: Plan) -> str:
    """Of the results of functions: that of the first static layer."""
    schemes = (d.scheme for d in plan.quantized.values() if _is_static(d))
    return next((s.observer for s in schemes if s is not None), "minmax")


def _refuse_scheme(name: str, decision: Decision) -> None:
    scheme = decision.scheme
    assert scheme is not None
    convolution = decision.type in CONVOLUTIONS
    if convolution and scheme.is_float:
        raise QawareError(f"{name}: bits: 16 is for Linear and Embedding, not {decision.type}; use bits: 8")
    if convolution and scheme.activation == "int8-dynamic":
        raise QawareError(
            f"{name}: activation: 'int8-dynamic' has no kernel for a {decision.type}; use int8-static or none"
        )
    if scheme.is_static and scheme.group_size:
        raise QawareError(
            f"{name}: group_size: {scheme.group_size} with int8-static activations has no kernel; use "
            "group_size: 0 (one scale per output channel), or activation: none"
        )


def _refuse_dtype(name: str, module: Any) -> None:
    if module.weight.dtype not in _DTYPES:
        raise QawareError(
            f"{name}: weight is {module.weight.dtype}; quantization needs float32, bfloat16 or float16"
        )


def _record(model: nn.Module, example: Example) -> Any:
    try:
        return record(model, lambda: example.run(model))
    except QawareError:
        raise
    except Exception as error:  # whatever the model's own forward makes of it
        shapes = ", ".join(str(tuple(t.shape)) for t in example.args if isinstance(t, Tensor))
        raise QawareError(
            f"{type(model).__name__}: cannot run on the example batch ({shapes}): "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _reachable(decision: Decision, reached: set[str], outside: set[str] | None) -> Decision:
    if not _is_static(decision):
        return decision
    if decision.module not in reached:
        why = "stays float: the example batch does not reach it, so nothing is known of its activations"
    elif outside is not None and decision.module in outside:
        why = "stays float: it is outside the model's own QuantStub and DeQuantStub"
    else:
        return decision
    return dataclasses.replace(decision, scheme=None, problem=None, reason=why)


def _computes_the_same(model: nn.Module, plan: Plan, example: Example) -> bool:
    """Whether watching its functions leaves what the model computes alone: a model that adds in place and
    goes on with the old tensor would not see the result."""
    if not _layout(plan).operations:
        return True
    watched = deep_copy(model)
    for scope in _layout(plan).scopes:
        add_scope(watched.get_submodule(scope))
    for site in _layout(plan).operations:
        add_operation(watched.get_submodule(site.owner), site, nn.Identity())
    with torch.no_grad():
        pairs = zip(tree_leaves(example.run(model)), tree_leaves(example.run(watched)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


def _without_operations(plan: Plan) -> Plan:
    """The plan with additions and concatenations left in float; layers after them round their own input."""
    layout = _layout(plan)
    names = {site.name for site in layout.operations}
    layers = tuple(
        dataclasses.replace(site, source=None) if site.source in names else site for site in layout.layers
    )
    return dataclasses.replace(plan, layout=Layout("eager", layers))


def _shipped(name: str, module: FakeQuantizedLayer, decision: Decision, result: QuantizedModel) -> Any:
    """Choose a layer's integers, and give its bias."""
    assert decision.scheme is not None
    with torch.no_grad():
        weight, bias = module.folded()
        result.weights[name] = _integers(module, weight.flatten(1), decision.scheme)
    return bias


def _integers(module: FakeQuantizedLayer, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """The integers of ``weight`` (rows, width) on the scales of the layer's fake-quantizer."""
    quantizer = module.weight_fake_quantizer
    quantizer(weight)
    scale = quantizer.scale.detach().reshape(len(weight), -1)
    zero_point = quantizer.zero_point.detach().to(torch.int8).reshape(len(weight), -1)
    integers = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, scheme.block(weight.shape[1])),
        integer_dtype(scheme),
        intx_choose_qparams_algorithm=None,
        custom_scale=scale,
        custom_zero_point=zero_point,
    )
    asymmetric = None if scheme.symmetric else zero_point.clone()
    return QuantizedWeight(integers.qdata, scale.float().clone(), asymmetric, scheme.weight)


def _observed(modules: dict[str, nn.Module], layout: Layout, result: QuantizedModel) -> None:
    """The grids of all sites."""
    for operation in layout.operations:
        module = modules[operation.name]
        assert isinstance(module, Operation)
        result.outputs[operation.name] = _grid(operation.name, module.quantizer)
    for site in layout.layers:
        result.outputs[site.module] = _grid(site.module, modules[site.module].output_fake_quantizer)
    for site in layout.layers:
        result.activations[site.module] = _input_grid(site, modules, result)


def _input_grid(site: LayerSite, modules: dict[str, nn.Module], result: QuantizedModel) -> ActivationRange:
    if site.source is not None:
        return result.outputs[site.source]
    return _grid(site.module, modules[site.module].activation_fake_quantizer)


def _grid(name: str, quantizer: Any) -> ActivationRange:
    try:
        scale, zero_point = quantizer.qparams()
    except QawareError as error:
        raise QawareError(f"{name}: {error}") from error
    return ActivationRange(float(scale), int(zero_point))
