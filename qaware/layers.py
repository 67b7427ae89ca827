"""The layer report: what each quantized layer computes beside the float model, worst first."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from qaware.copying import deep_copy
from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.operations import activate, add_operation, add_scope
from qaware.layout import LayerSite, Layout
from qaware.taps import Clipping, Taps

CEILING = 200.0
"""Decibels that stand for no difference at all; minus as many for NaN or infinity."""
_UNMATCHED = (
    "outputs are not compared where a layer runs in one of the two models only, or under another name"
)
_NOT_RUN = "only weights are compared: there is no example to run"
_GRAPH = (
    "the layers of this model are parts of one graph, so only their weights are compared, "
    "up to a factor for each output channel, which a folded batch norm may be"
)


@dataclass(frozen=True)
class LayerError:
    """One quantized layer, or function whose result is rounded. None is what is not known."""

    name: str
    kind: str
    """Class of the layer, or ``add`` or ``cat``."""
    order: int | None = None
    """When it first runs, from 0, among those of the report."""
    output_sqnr: float | None = None
    """Of its output against the float model's, both run from end to end, so with the errors of the layers
    before; in dB."""
    weight_sqnr: float | None = None
    """Of its weight, with a batch norm folded into it, in dB."""
    input_clipped: float | None = None
    """Share of the values entering it that are beyond the int8 range and are clipped."""
    output_clipped: float | None = None
    """Share of the values leaving it that are."""
    weight_at_ends: float | None = None
    """Share of its weights that are the smallest or largest integer."""


@dataclass(frozen=True)
class LayerReport:
    """All quantized layers, the one with the least output SQNR first."""

    layers: tuple[LayerError, ...]
    notes: tuple[str, ...] = ()
    """What could not be found out."""

    def worst(self, count: int = 5) -> tuple[LayerError, ...]:
        """The first ``count`` layers of which something is known."""
        known = (
            layer for layer in self.layers if layer.output_sqnr is not None or layer.weight_sqnr is not None
        )
        return tuple(known)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"layers": [dataclasses.asdict(layer) for layer in self.layers], "notes": list(self.notes)}


@torch.no_grad()
def layer_report(float_model: nn.Module, quantized: QuantizedModel, *args: Any, **kwargs: Any) -> LayerReport:
    """Run both models on one example and compare them layer by layer.

    Copies run, on the CPU, so neither model changes. Of an output at most a million evenly spaced values are
    compared, so that a large model's fit in memory.

    Args:
        float_model: what was quantized; also a prepared one whose fake-quantizers are off.
        quantized: its converted model, by any engine. Of the graph engine's, whose layers are parts of one
            graph, only weights are compared.
        args, kwargs: arguments of ``forward``; without any, only weights are compared.
    """
    layout = quantized.plan.layout or Layout("modules")
    found = {name: LayerError(name, d.type) for name, d in quantized.plan.quantized.items()}
    found.update({site.name: LayerError(site.name, site.kind) for site in layout.operations})
    graph = layout.engine == "graph"
    found = {name: _compare_weight(e, float_model, quantized, layout) for name, e in found.items()}
    note = _GRAPH if graph else "" if args or kwargs else _NOT_RUN
    if not note:
        args, kwargs = tree_map(_to_cpu, (args, kwargs))
        found = _compare_outputs(found, float_model, quantized, layout, lambda model: model(*args, **kwargs))
        note = _UNMATCHED if any(error.output_sqnr is None for error in found.values()) else ""
    return LayerReport(tuple(sorted(found.values(), key=_badness)), (note,) if note else ())


def float_twin(prepared: nn.Module) -> nn.Module:
    """A copy of a prepared model that computes in float what it has learned. The converted model is compared
    with it, so that training is not taken for an error."""
    twin = deep_copy(prepared)
    set_fake_quant(twin, False)
    return twin


def sqnr(reference: Tensor, got: Tensor) -> float:
    """Signal to quantization noise in dB: ten times the decimal logarithm of the energy of ``reference`` over
    that of the difference; within plus and minus ``CEILING``. Any shape, both the same."""
    signal = float(reference.double().square().sum())
    noise = float((reference.double() - got.double()).square().sum())
    if not math.isfinite(signal) or not math.isfinite(noise):
        return -CEILING
    if noise == 0 or signal == 0:
        return CEILING if noise == 0 else -CEILING
    return max(-CEILING, min(CEILING, 10 * math.log10(signal / noise)))


def _badness(error: LayerError) -> tuple[float, float]:
    output, weight = error.output_sqnr, error.weight_sqnr
    return math.inf if output is None else output, math.inf if weight is None else weight


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _compare_weight(
    error: LayerError, float_model: nn.Module, quantized: QuantizedModel, layout: Layout
) -> LayerError:
    weight = quantized.weights.get(error.name)
    if weight is None:
        return error
    narrow = layout.engine == "graph" or layout.layer(error.name) is not None
    error = dataclasses.replace(error, weight_at_ends=_at_ends(weight, narrow))
    got = weight.dequantize().cpu()
    modules = dict(float_model.named_modules())
    expected = getattr(modules.get(error.name), "weight", None)
    if not isinstance(expected, Tensor) or expected.numel() != got.numel():
        return error
    rows = expected.detach().float().cpu().reshape(got.shape)
    site = layout.layer(error.name)
    norm = modules.get(site.batch_norm) if site is not None and site.batch_norm else None
    if layout.engine == "graph":
        fitted = (rows * got).sum(1) / rows.square().sum(1).clamp_min(1e-30)
        rows = rows * fitted.unsqueeze(1)
    elif isinstance(norm, _BatchNorm):
        rows = rows * _factor(norm).unsqueeze(1)
    return dataclasses.replace(error, weight_sqnr=sqnr(rows, got))


def _factor(norm: _BatchNorm) -> Tensor:
    """What a folded batch norm multiplies each output channel by."""
    assert norm.running_var is not None
    factor = 1 / torch.sqrt(norm.running_var.detach().float().cpu() + norm.eps)
    return factor if norm.weight is None else factor * norm.weight.detach().float().cpu()


def _at_ends(weight: QuantizedWeight, narrow: bool) -> float | None:
    if weight.scheme.is_float or not weight.data.numel():
        return None
    lowest, highest = weight.scheme.range
    # A symmetric weight that meets integer activations goes without its smallest integer.
    narrows = narrow and weight.zero_point is None and highest and weight.scheme.level_set is None
    lowest = -highest if narrows else lowest
    return float(((weight.data <= lowest) | (weight.data >= highest)).double().mean())


def _compare_outputs(
    found: dict[str, LayerError],
    float_model: nn.Module,
    quantized: QuantizedModel,
    layout: Layout,
    run: Callable[[nn.Module], Any],
) -> dict[str, LayerError]:
    sites = {site.module: site for site in layout.layers}
    ours = _float_copy(float_model, layout)
    expected = Taps(ours, {_place(name, sites.get(name)) for name in found})
    with expected:
        run(ours)
    theirs = copy.deepcopy(quantized.module).cpu()
    got, counts = Taps(theirs, found), Clipping(theirs, quantized)
    with got, counts:
        run(theirs)
    order = {name: index for index, name in enumerate(got.outputs)}
    return {
        name: dataclasses.replace(
            error,
            order=order.get(name),
            output_sqnr=_output_sqnr(
                expected.outputs.get(_place(name, sites.get(name))), got.outputs.get(name), sites.get(name)
            ),
            input_clipped=counts.share(name, "input"),
            output_clipped=counts.share(name, "output"),
        )
        for name, error in found.items()
    }


def _place(name: str, site: LayerSite | None) -> str:
    """The module of the float model whose output is compared: the last that is fused into the layer."""
    return name if site is None or site.batch_norm is None else site.batch_norm


def _float_copy(float_model: nn.Module, layout: Layout) -> nn.Module:
    """With a submodule at each function that the quantized model rounds, so that its result is seen."""
    model = deep_copy(float_model).cpu().eval()
    known = dict(model.named_modules())
    for scope in layout.scopes:
        if scope in known:
            add_scope(known[scope])
    for site in layout.operations:
        if site.name not in known and site.owner in known:
            add_operation(known[site.owner], site, nn.Identity())
    return model


def _output_sqnr(
    expected: list[Tensor] | None, got: list[Tensor] | None, site: LayerSite | None
) -> float | None:
    if not expected or not got or [t.shape for t in expected] != [t.shape for t in got]:
        return None
    reference = torch.cat(expected)
    if site is not None:
        reference = activate(reference, site.relu, site.ceiling)
    return sqnr(reference, torch.cat(got))
