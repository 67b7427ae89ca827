"""The ``modules`` engine: torchao's fake-quantized layers and integer tensors, by class swap.

``torchao.quantize_`` replaces modules; that drops forward hooks, splits shared modules and leaves
pruning or averaging callbacks holding orphans. Here the class of the module changes and the object
stays, so names, hooks, sharing and ties survive. torchao's own fake-quantizers and tensors do the
arithmetic, in training and after conversion, which is why both agree exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchao.quantization.qat import FakeQuantizedLinear

from qaware.adapters import from_peft
from qaware.engines.activation_fake_quant import StaticFakeQuantizer, activation_fake_quantizer
from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.embedding import LookedUpEmbedding
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.integer import become_integer
from qaware.engines.weight_fake_quant import weight_fake_quantizer
from qaware.errors import QawareError
from qaware.plan import Decision, Plan
from qaware.scheme import Scheme
from qaware.sharded import set_class

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ModulesEngine:
    """Prepare and convert ``nn.Linear`` and ``nn.Embedding`` with torchao."""

    name = "modules"

    def prepare(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Turn the planned layers into fake-quantized ones, in place; those that are so already stay.

        Raises:
            QawareError: a layer cannot hold its scheme, nothing is quantized, a weight's dtype has no
                fake-quantizer (float64), or a LoRA layer has dropout.
        """
        plan.require_possible()
        modules = dict(model.named_modules())
        for name in plan.quantized:
            _refuse_dtype(name, modules[name])
        lora = _lora_support(model)
        if lora is not None:
            lora.check(model, plan)
        for name, decision in plan.quantized.items():
            if not hasattr(modules[name], "weight_fake_quantizer"):
                _prepare_layer(modules[name], decision)
        if lora is not None:
            lora.prepare(model)
        leave_fast_path(model)
        return model

    def convert(self, model: nn.Module, plan: Plan) -> QuantizedModel:
        """Turn the fake-quantized layers into integer ones, in place, in evaluation mode.

        Adapters of peft are merged and its modules removed: the result's module, plan and weights have the
        names that are left.

        Raises:
            QawareError: a planned layer is not prepared, or a static range was never observed.
        """
        modules = dict(model.named_modules())
        for name in plan.quantized:
            if not hasattr(modules.get(name), "weight_fake_quantizer"):
                raise QawareError(
                    f"{name}: is not prepared; call prepare() with the same recipe before convert()"
                )
        result = QuantizedModel(model.eval(), plan, weights={})
        set_fake_quant(model, True)
        # All before the first: a weight made later could get the address, and so the integers, of one that
        # is gone.
        for name in plan.quantized:
            _finish_pruning(modules[name])
        lora = _lora_support(model)
        if lora is not None:
            lora.merge(model)
        shared: dict[tuple[int, Scheme, bool], QuantizedWeight] = {}
        for name, decision in plan.quantized.items():
            _convert_layer(name, modules[name], decision, result, shared)
        return result if lora is None else lora.unload(result)

    def rebuild(
        self,
        model: nn.Module,
        plan: Plan,
        weights: dict[str, QuantizedWeight],
        activations: dict[str, ActivationRange],
    ) -> QuantizedModel:
        """The converted model from integers that were kept; the float ``model`` changes in place. Its weights
        give the dtype to compute in, their values are dropped."""
        modules = dict(model.named_modules())
        for name, decision in plan.quantized.items():
            become_integer(modules[name], decision, weights[name], activations.get(name))
        leave_fast_path(model)
        return QuantizedModel(model.eval(), plan, weights, activations)


def _lora_support(model: nn.Module) -> Any:
    """What knows peft, an optional package, for a model with modules of it; else None."""
    if not any(from_peft(module) for module in model.modules()):
        return None
    from qaware.engines import lora

    return lora


def _refuse_dtype(name: str, module: Any) -> None:
    dtype = module.weight.dtype
    if dtype not in _DTYPES:
        raise QawareError(f"{name}: weight is {dtype}; quantization needs float32, bfloat16 or float16")


def _prepare_layer(module: Any, decision: Decision) -> None:
    scheme = decision.scheme
    assert scheme is not None
    device = module.weight.device
    if decision.type == "Linear":
        set_class(module, FakeQuantizedLinear)
        activation = activation_fake_quantizer(scheme)
        module.activation_fake_quantizer = None if activation is None else activation.to(device)
    else:
        set_class(module, LookedUpEmbedding)
    module.weight_fake_quantizer = weight_fake_quantizer(scheme).to(device)
    module.train(module.training)


def leave_fast_path(model: nn.Module) -> None:
    """PyTorch's fused encoder layer takes its linear layers' weights past their fake-quantizers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def _finish_pruning(module: Any) -> None:
    """Pruned and not made permanent: the weight is a product with a mask, not a parameter."""
    if "weight_mask" in module._buffers:
        prune.remove(module, "weight")


def _convert_layer(
    name: str,
    module: Any,
    decision: Decision,
    result: QuantizedModel,
    shared: dict[tuple[int, Scheme, bool], QuantizedWeight],
) -> None:
    scheme = decision.scheme
    assert scheme is not None
    shipped = vars(module).pop("merged", module.weight.detach())
    key = (shipped.data_ptr(), scheme.weight, scheme.per_tensor)
    if key not in shared:
        shared[key] = _quantize(module, shipped, scheme.weight)
    weight = shared[key]
    result.weights[name] = weight
    activation = getattr(module, "activation_fake_quantizer", None)
    del module.weight_fake_quantizer
    if hasattr(module, "activation_fake_quantizer"):
        del module.activation_fake_quantizer
    if isinstance(activation, StaticFakeQuantizer):
        result.activations[name] = _range(name, activation)
    become_integer(module, decision, weight, result.activations.get(name))


def _range(name: str, activation: StaticFakeQuantizer) -> ActivationRange:
    try:
        scale, zero_point = activation.qparams()
    except QawareError as error:
        raise QawareError(f"{name}: {error}") from error
    return ActivationRange(float(scale), int(zero_point))


@torch.no_grad()
def _quantize(module: Any, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """The integers of ``weight`` (the module's, or with adapters added) on the scales that the fake-quantizer
    chooses for the module's; torchao does both roundings."""
    quantizer = module.weight_fake_quantizer
    if scheme.is_float:
        return QuantizedWeight(weight.half(), None, None, scheme)
    quantizer(module.weight.detach())
    return integers_of(weight, quantizer, scheme)


def integers_of(weight: Tensor, quantizer: Any, scheme: Scheme) -> QuantizedWeight:
    """The integers of ``weight`` (rows, width) on the scales that a weight's fake-quantizer used last."""
    # By the arithmetic of training, in its precision: torchao divides by a bfloat16 scale in bfloat16, and a
    # float32 division would choose another integer now and then.
    data, scale = quantizer.to_integers(weight)
    blocks = (weight.shape[0], -1)
    zero_point = None if scheme.symmetric else quantizer.zero_point.detach().to(torch.int8).reshape(blocks)
    return QuantizedWeight(data, scale.reshape(blocks), zero_point, scheme)
