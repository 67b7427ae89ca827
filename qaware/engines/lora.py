"""LoRA under the ``modules`` engine: ``peft`` adapters trained inside the rounding of a frozen weight.

An adapter added after the rounding would change the integers when it is merged. So a prepared layer rounds
the sum, in the grid of the frozen weight W: ``round(W + B A)`` on the scale and zero point of W, with the
gradient passed straight through to A and B. This is low-rank QAT (LR-QAT, Bondarenko, Del Chiaro, Nagel
2024, arXiv:2406.06385), here with peft's own layers and the grid read from W anew in every pass; a base
weight that is trained too takes its grid along. At convert the same integers stay and the adapters go.

A sum beyond the range of W's grid is clipped to it, and its gradient there is zero. Where W is frozen its
gradient, as large as W, is not computed; see :mod:`qaware.engines.low_rank`.

Imported only for a model with modules of peft.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torchao.quantization.qat import FakeQuantizedLinear

from qaware.adapters import successor
from qaware.engines.base import QuantizedModel
from qaware.engines.low_rank import Factors, pass_to_factors
from qaware.engines.weight_fake_quant import Float16FakeQuantizer, WeightFakeQuantizer
from qaware.errors import QawareError
from qaware.plan import Plan
from qaware.sharded import set_class


class FakeQuantizedBase(FakeQuantizedLinear):
    """The layer under an adapter."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """(..., in_features) to (..., out_features); ``delta`` (out_features, in_features) is added to the
        weight before it is rounded."""
        if delta is None:
            output: Tensor = super().forward(x)
            return output
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x)
        return F.linear(x, self._rounded(_sum(self.weight, delta)), self.bias)

    def through(self, x: Tensor, delta: Tensor, factors: list[Factors]) -> Tensor:
        """``forward`` for a ``delta`` without a gradient, which ``factors``, of which it is the sum, get."""
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x)
        summed = _sum(self.weight, delta)
        rounded, clipped = self.weight_fake_quantizer.with_clipped(summed, self.weight)
        return pass_to_factors(F.linear(x, rounded, self.bias), x, clipped, factors)

    @property
    def is_frozen(self) -> bool:
        """Whether neither the weight nor its grid trains, and its rounding is one that clips."""
        quantizer: Any = self.weight_fake_quantizer
        rounds = isinstance(quantizer, WeightFakeQuantizer) and quantizer.scheme.is_evenly_spaced
        return rounds and quantizer.learned is None and not self.weight.requires_grad

    def _rounded(self, weight: Tensor) -> Tensor:
        quantizer: Any = self.weight_fake_quantizer
        gridless = isinstance(quantizer, Float16FakeQuantizer)
        rounded: Tensor = quantizer(weight) if gridless else quantizer(weight, grid=self.weight)
        return rounded


class FakeQuantizedLora(lora.Linear):
    """A LoRA layer whose active adapters go through the rounding with the weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features). With fake-quant off, or adapters disabled, peft's own
        computation, bit for bit.

        Raises:
            QawareError: the batch mixes adapters, or dropout is on.
        """
        if self.disable_adapters or not self.base_layer.weight_fake_quantizer.enabled:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        if kwargs.get("adapter_names") is not None:
            raise QawareError("adapter_names: one batch has one rounded weight; use set_adapter() instead")
        if self.training:
            _refuse_dropout("a LoRA layer", self)
        factors = self._factors()
        if (
            factors
            and self.base_layer.is_frozen
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            with torch.no_grad():
                delta = self.delta()
            passed: Tensor = self.base_layer.through(x, delta, factors)
            return passed
        result: Tensor = self.base_layer(x, self.delta())
        return result

    def delta(self) -> Tensor | None:
        """What the active adapters add to the weight, (out_features, in_features); None for nothing."""
        # In the precision of the adapters under any autocast, so that training sees what convert merges.
        with torch.autocast(self.weight.device.type, enabled=False):
            deltas = [self.get_delta_weight(name) for name in self._active()]
        return sum(deltas[1:], deltas[0]) if deltas else None

    def _active(self) -> list[str]:
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]

    def _factors(self) -> list[Factors]:
        """What :meth:`delta` is made of."""
        found = [
            Factors(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
            for name in self._active()
        ]
        return found if any(f.a.requires_grad or f.b.requires_grad for f in found) else []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the sum would become the weight and take the grid along."""
        raise QawareError("merge: a prepared LoRA layer is merged by qaware.convert(), in its weight's grid")


def check(model: nn.Module, plan: Plan) -> None:
    """Refuse, before any layer is prepared, adapters that the rounding has no place for.

    Raises:
        QawareError: a layer to be quantized has an active lora_dropout.
    """
    for name in plan.quantized:
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, lora.Linear):
            _refuse_dropout(name, layer)


def prepare(model: nn.Module) -> None:
    """Turn the LoRA layers whose base layer is fake-quantized into :class:`FakeQuantizedLora`, in place."""
    for layer in list(model.modules()):
        if isinstance(layer, lora.Linear) and hasattr(layer.base_layer, "weight_fake_quantizer"):
            set_class(layer, FakeQuantizedLora)
            set_class(layer.base_layer, FakeQuantizedBase)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Leave, at each prepared base layer, the sum that ships as the plain attribute ``merged``."""
    for layer in model.modules():
        if isinstance(layer, FakeQuantizedLora) and (delta := layer.delta()) is not None:
            layer.base_layer.merged = _sum(layer.base_layer.weight, delta)


def unload(quantized: QuantizedModel) -> QuantizedModel:
    """``quantized`` without any module of peft, under the names that are left; in place.

    Adapters of layers that stay float are merged as ``merge_and_unload`` does.
    """
    before = dict(quantized.module.named_modules())
    module = _plain(quantized.module)
    for parent in list(module.modules()):
        if successor(parent) is None:
            _replace_children(parent)
    after = {id(m): name for name, m in module.named_modules()}
    names = {name: after[id(m)] for name, m in before.items() if id(m) in after}
    return dataclasses.replace(
        quantized,
        module=module,
        plan=quantized.plan.renamed(names),
        weights={names[n]: weight for n, weight in quantized.weights.items() if n in names},
        activations={names[n]: found for n, found in quantized.activations.items() if n in names},
    )


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight + delta).to(weight.dtype)


def _refuse_dropout(name: str, layer: Any) -> None:
    dropped = [p for d in layer.lora_dropout.values() if d.training and (p := getattr(d, "p", 0.0)) > 0]
    if dropped:
        raise QawareError(
            f"{name}: lora_dropout is {dropped[0]}, and inside the rounding there is no input of the adapter "
            "to drop; set lora_dropout=0"
        )


def _replace_children(parent: nn.Module) -> None:
    # Traces by which peft and transformers know a model that has adapters.
    for trace in ("peft_config", "_hf_peft_config_loaded"):
        vars(parent).pop(trace, None)
    for name, child in list(parent._modules.items()):
        if child is not None and (plain := _plain(child)) is not child:
            setattr(parent, name, plain)


def _plain(module: Any) -> nn.Module:
    """``module``, or what is left of it without peft."""
    left: nn.Module | None = successor(module)
    if left is None:
        return module  # type: ignore[no-any-return]
    # The base layer of the first holds the sum already.
    if isinstance(module, BaseTunerLayer) and not isinstance(module, FakeQuantizedLora):
        left = _merged(module)
    return _plain(left)


def _merged(layer: Any) -> nn.Module:
    """The base layer, with the active adapters added by peft."""
    base: nn.Module = layer.base_layer
    merge = not layer.disable_adapters
    _untie(base)
    if hasattr(layer, "unload_and_optionally_merge_module"):
        base = layer.unload_and_optionally_merge_module(merge, False, None)
    elif merge:
        layer.merge()
    return base


def _untie(module: nn.Module) -> None:
    """Give it parameters of its own: peft merges in place, which would change a tied embedding too."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
