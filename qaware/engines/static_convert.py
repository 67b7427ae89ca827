"""Choose the integers of a prepared model: its weights', and the grids that its observers found."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.modules import integers_of
from qaware.engines.operations import Operation
from qaware.engines.static_layers import FakeQuantizedLayer
from qaware.errors import QawareError
from qaware.layout import LayerSite, Layout
from qaware.plan import Decision


def choose_integers(name: str, module: FakeQuantizedLayer, decision: Decision, result: QuantizedModel) -> Any:
    """The integers of a layer, into ``result``; returns the bias that ships, float32 (rows,) or None."""
    assert decision.scheme is not None
    with torch.no_grad():
        weight, bias = module.folded()
        module.rounded(weight)
        rows = weight.flatten(1)
        made = integers_of(rows, module.weight_fake_quantizer, decision.scheme)
        # Of one scale for all rows there is only a view.
        scale = None if made.scale is None else made.scale.clone()
        zero_point = None if made.zero_point is None else made.zero_point.clone()
        result.weights[name] = QuantizedWeight(made.data, scale, zero_point, decision.scheme.weight)
        return module.rounded_bias(bias)


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
