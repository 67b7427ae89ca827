"""Scales and zero points of weights that are trained (``Recipe.learning``).

The scale is ``base * exp(gain)``: ``base`` is found when the forward pass first rounds, and ``gain`` is
trained from zero. In the log domain (TQT, Jain et al. 2020, arXiv:1903.08066) a step of Adam changes a
scale by a share of itself, weight decay pulls it to where it began, and it stays positive. ``lsq`` scales
its gradient as learned step sizes do (LSQ, Esser et al. 2020, arXiv:1902.08153); ``range`` does not, and
also trains the zero points of asymmetric weights.

Scales are trained where weights are frozen too (LoRA, an embedding): rounding moves what a frozen weight
computes, and its scale is what can make up for that. Freeze ``weight_fake_quantizer.learned`` to keep them.

torchao's ``range_learning`` is not used: it makes parameters in the first forward pass, when the optimizer
is already there, and does not keep the scale positive or in the precision that ships.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.quant_primitives import _Round

from qaware.engines.levels import shrink
from qaware.engines.static_layers import FakeQuantizedLayer
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.errors import QawareError
from qaware.plan import Plan
from qaware.sharded import is_sharded

_FARTHEST = 8.0
"""Of a gain from zero, a factor of 3000: further steps, of a learning rate that is far too high, change
nothing, so that a scale stays finite and above zero in every precision."""


class _Passed(torch.autograd.Function):
    """The second argument, with its gradient, times the third, passed to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None, None


class LearnedGrid(nn.Module):
    """Scale and zero point of one weight, or of several layers that share it.

    ``base`` and, of asymmetric weights, ``zero`` are multiplied by ``began``, 0 before they are known and
    then 1: an average over training that began with zeros is right when it is divided by the average of
    that.
    """

    base: Tensor
    began: Tensor
    zero: Tensor | None

    def __init__(self, quantizer: WeightFakeQuantizer, shape: tuple[int, int], learning: str) -> None:
        """
        Args:
            quantizer: of the weight.
            shape: of its scales: rows and blocks, (1, 1) for one scale of all.
            learning: ``lsq`` or ``range``.
        """
        super().__init__()
        self.learning = learning
        self.symmetric = quantizer.scheme.symmetric
        self.gain = nn.Parameter(torch.zeros(shape))
        self.register_buffer("base", torch.zeros(shape))
        self.register_buffer("began", torch.zeros(()))
        self.register_buffer("zero", None if self.symmetric else torch.zeros(shape))
        learns = learning == "range" and not self.symmetric
        self.shift = nn.Parameter(torch.zeros(shape)) if learns else None
        self.known = False
        """Whether ``base`` is; a plain attribute, which a compiled forward pass can branch on."""

    def reset_parameters(self) -> None:
        """Fill parameters and buffers after they were materialized from the meta device."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.detach().zero_()
        self.known = False

    def qparams(
        self, x: Tensor, quantizer: WeightFakeQuantizer, unit: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scale, in the precision that ships, and zero point, both (rows, blocks), with gradients.

        Args:
            x: the weight (rows, width), from which both are found in the first call.
            quantizer: that of the layer.
            unit: (rows, 1), what the scale is a multiple of; None for 1.
        """
        if not self.known:
            self._begin(x, quantizer, unit)
        lowest, highest = quantizer.integers
        weights = x.numel() / self.gain.numel()
        factor = (weights * max(highest, 1)) ** -0.5 if self.learning == "lsq" else 1.0
        gain = _Passed.apply(self.gain, self.gain.detach().clamp(-_FARTHEST, _FARTHEST), factor)
        exact = self.base / self.began * torch.exp(gain)
        exact = exact if unit is None else exact * unit
        # In float32, where its gradient, a sum of many large terms, does not overflow.
        scale = _Passed.apply(exact, quantizer.legal(exact.detach()).float(), 1.0)
        if self.zero is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        else:
            zero_point = self.zero / self.began
            if self.shift is not None:
                zero_point = zero_point + self.shift * (highest - lowest)
            zero_point = _Round.apply(zero_point).clamp(lowest, highest)
        rows = len(x)
        return scale.expand(rows, -1), zero_point.expand(rows, -1)

    def idle(self) -> Tensor:
        """Zero, with a gradient of zero for every parameter: distributed training waits for all of them."""
        zero = 0 * self.gain.sum()
        return zero if self.shift is None else zero + 0 * self.shift.sum()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _begin(self, x: Tensor, quantizer: WeightFakeQuantizer, unit: Tensor | None) -> None:
        scale, zero_point = quantizer.chosen(x)
        scale = shrink(x, scale, zero_point, quantizer.scheme, quantizer.integers)
        scale = _alive(x, scale.float(), quantizer)
        scale = scale if unit is None else scale / unit
        rows = len(self.base)
        self.base.copy_(scale[:rows])
        if self.zero is not None:
            self.zero.copy_(zero_point[:rows])
        self.began.fill_(1.0)
        self.known = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Float weights may be loaded, on which the grid begins anew."""
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if tensor is not None:
                state_dict.setdefault(f"{prefix}{name}", torch.zeros_like(tensor))
        self.known = bool(state_dict[f"{prefix}began"] > 0)
        super()._load_from_state_dict(state_dict, prefix, *args)


def learn_grids(model: nn.Module, plan: Plan) -> None:
    """Give the weights of a prepared ``model`` learned scales, where the recipe says so, in place; those
    that have them keep them. Layers that share a weight and its scheme share the scales.

    Raises:
        QawareError: the graph engine or a sharded module, which cannot train them.
    """
    learning = plan.recipe.learning
    if learning == "none":
        return
    _refuse(model, plan)
    found: dict[Any, LearnedGrid] = {}
    for name in plan.quantized:
        module: Any = model.get_submodule(name)
        quantizer = module.weight_fake_quantizer
        if not isinstance(quantizer, WeightFakeQuantizer):  # float16 has no scale
            continue
        weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
        shape = _shape(quantizer, weight)
        key = (id(weight), quantizer.scheme.weight, quantizer.integers, shape)
        if quantizer.learned is None:
            made = found.get(key) or LearnedGrid(quantizer, shape, learning)
            quantizer.learned = made.to(weight.device)
        found.setdefault(key, quantizer.learned)


def grids(model: nn.Module) -> list[LearnedGrid]:
    """All learned grids of a prepared model, each once."""
    return [module for module in model.modules() if isinstance(module, LearnedGrid)]


@torch.no_grad()
def begin_grids(model: nn.Module) -> None:
    """Find the scales that are not known yet, as the first forward pass that rounds would."""
    for module in model.modules():
        quantizer: Any = getattr(module, "weight_fake_quantizer", None)
        learned = getattr(quantizer, "learned", None)
        if learned is None or learned.known:
            continue
        if isinstance(module, FakeQuantizedLayer):
            module.rounded(module.folded()[0])
        else:
            quantizer(module.weight)


def begin_alike(source: nn.Module, average: nn.Module) -> None:
    """Give an average of ``source`` that has not begun what the grids of ``source`` began with."""
    for ours, theirs in zip(grids(source), grids(average), strict=True):
        if ours.known and not theirs.known:
            theirs.known = True
            if not theirs.began.any():
                for name, buffer in ours.named_buffers():
                    theirs.get_buffer(name).copy_(buffer)


def _refuse(model: nn.Module, plan: Plan) -> None:
    learning = plan.recipe.learning
    if plan.layout is not None and plan.layout.engine == "graph":
        raise QawareError(
            f"learning: {learning!r} is for the modules and eager engines, not graph; use engine: eager, or "
            "learning: none"
        )
    if any(is_sharded(module) for module in model.modules()):
        raise QawareError(
            f"learning: {learning!r} is not trained in sharded modules (FSDP2), which would not sum its "
            "gradients; use DDP, or learning: none"
        )


def _shape(quantizer: WeightFakeQuantizer, weight: Tensor) -> tuple[int, int]:
    if quantizer.scheme.per_tensor:
        return 1, 1
    width = weight[0].numel()
    return len(weight), width // quantizer.scheme.block(width)


def _alive(x: Tensor, scale: Tensor, quantizer: WeightFakeQuantizer) -> Tensor:
    """``scale`` (rows, blocks), but that of the other blocks where all weights are zero: on its own, of
    almost nothing, they could never grow."""
    used = x.reshape(*scale.shape, -1).ne(0).any(-1)
    width, highest = x.shape[1], max(quantizer.integers[1], 1)
    mean = scale.where(used, 0.0).sum() / used.sum().clamp(min=1)
    usual = torch.where(used.any(), mean, width**-0.5 / highest)
    return scale.where(used, usual)
