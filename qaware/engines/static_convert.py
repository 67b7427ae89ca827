"""Choose the integers of a prepared model: its weights', and the grids that its observers found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.fake_quant import integer_dtype
from qaware.engines.operations import Operation
from qaware.engines.static_layers import FakeQuantizedLayer
from qaware.errors import QawareError
from qaware.layout import LayerSite, Layout
from qaware.plan import Decision
from qaware.scheme import Scheme


def choose_integers(name: str, module: FakeQuantizedLayer, decision: Decision, result: QuantizedModel) -> Any:
    """The integers of a layer, into ``result``; returns the bias that ships, float32 (rows,) or None."""
    assert decision.scheme is not None
    with torch.no_grad():
        weight, bias = module.folded()
        result.weights[name] = _integers(module, weight.flatten(1), decision.scheme)
        return module.rounded_bias(bias)


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


def read_grids(modules: dict[str, nn.Module], layout: Layout, result: QuantizedModel) -> None:
    """The grids of all sites, into ``result``; ``modules`` are the prepared ones, by name."""
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
