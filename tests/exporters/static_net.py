"""A small residual network of integer layers that every exporter's test shares."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.operations import add_operation
from qaware.engines.static_integer import Requantize, become_integer_layer
from qaware.exporters.base import Runner
from qaware.exporters.signature import Signature, TensorSpec
from qaware.layout import LayerSite, Layout, OperationSite
from qaware.recipe import Recipe

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 3, 16, 16)),), {"batch": (1, 32)})
BATCHES = (1, 2, 15, 16, 32)
RELU = ("stem", "block.first", "depthwise")
SOURCES = {"block.second": "block.first", "grouped": "depthwise"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))) + x)


class StaticNet(nn.Module):
    """Residual addition, max pooling, a depthwise, a grouped and dilated convolution, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.block = Block()
        self.depthwise = nn.Conv2d(16, 16, 3, 2, 1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4, bias=False)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(self.block(self.pool(F.relu(self.stem(x))))))
        x = torch.cat([x, self.grouped(x)], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def static_net(per_tensor: bool = False, bits: int = 8) -> QuantizedModel:
    """StaticNet on integers, with the ranges of one batch."""
    torch.manual_seed(0)
    model = StaticNet().eval().requires_grad_(False)
    scheme = {"bits": bits, "activation": "int8-static", "per_tensor": per_tensor}
    plan = Recipe.load({"rules": [{"type": t, "scheme": scheme} for t in ("Conv2d", "Linear")]}).match(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    sites = tuple(LayerSite(name, relu=name in RELU) for name in layers)
    quantized = QuantizedModel(model, dataclasses.replace(plan, layout=Layout("eager", sites)), {})
    for name, (entering, leaving) in _ranges(model, layers).items():
        quantized.activations[name] = quantized.outputs.get(SOURCES.get(name, ""), entering)
        quantized.outputs[name] = leaving
        _convert(name, layers[name], quantized, 2 ** (bits - 1) - 1)
    quantized.outputs["block.add"], quantized.outputs["cat"] = grid(0.0, 3.0), grid(-1.0, 1.5)
    added = OperationSite("block", "add", 0, relu=True)
    add_operation(model.block, added, Requantize(quantized.outputs["block.add"]))
    add_operation(model, OperationSite("", "cat", 0), Requantize(quantized.outputs["cat"]))
    return quantized


def grid(low: float, high: float) -> ActivationRange:
    scale = (max(high, 0.0) - min(low, 0.0)) / 255
    return ActivationRange(scale, round(-128 - min(low, 0.0) / scale))


def _ranges(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, tuple[ActivationRange, ...]]:
    found: dict[str, tuple[ActivationRange, ...]] = {}

    def hook(name: str):
        def look(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            y = F.relu(y) if name in RELU else y
            found[name] = tuple(grid(float(t.min()), float(t.max())) for t in (args[0], y))

        return look

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    model(images(4))
    for handle in handles:
        handle.remove()
    return found


def _convert(name: str, layer: nn.Module, quantized: QuantizedModel, highest: int) -> None:
    scheme = quantized.plan.layer(name).scheme
    assert scheme is not None
    rows = layer.weight.flatten(1)
    largest = rows.abs().amax() if scheme.per_tensor else rows.abs().amax(1, keepdim=True)
    scale = (largest / highest).expand(len(rows), 1).contiguous()
    weight = QuantizedWeight((rows / scale).round().to(torch.int8), scale, None, scheme.weight)
    # Kernels keep a bias as int32; on that grid there is nothing left to round, so all runtimes agree.
    unit = scale.flatten().double() * quantized.activations[name].scale
    bias = None if layer.bias is None else ((layer.bias.double() / unit).round() * unit).float()
    grids = quantized.activations[name], quantized.outputs[name]
    become_integer_layer(layer, type(layer).__name__, weight, bias, *grids, name in RELU)
    quantized.weights[name] = weight


@torch.no_grad()
def steps(run: Runner, quantized: QuantizedModel, output: str = "fc") -> tuple[float, float]:
    """Largest difference in steps of the output, and the share of values that differ, in all batches."""
    pairs = [(run(images(n, n)), quantized.module(images(n, n))) for n in BATCHES]
    difference = torch.cat([(a - b).flatten() for a, b in pairs]).abs() / quantized.outputs[output].scale
    return round(float(difference.max()), 3), float((difference > 0.5).float().mean())
