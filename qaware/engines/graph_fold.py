"""Batch norms folded into the layer before them, in a graph that still trains.

In evaluation the graph computes what ships: the product with the folded and rounded weight. In training it
follows Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (CVPR 2018), in PyTorch's one-pass form: the product with the weight folded by the running
statistics and rounded, divided by the fold again, then the batch norm with the batch's own statistics.
torchao's rewriting of the same patterns supposes the default epsilon and momentum, and divides by zero for
a channel whose gamma is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qaware.engines.graph_normal import is_product
from qaware.engines.graph_trace import MODES, flag, owner, read

NORM = "qaware_norm"
"""Key in the ``meta`` of a layer's node: of the batch norm that was folded into it, ``momentum``, ``owner``
(its name in the model) and whether it ``trains``."""
ORIGINAL = "qaware_original"
"""Key in the ``meta`` of a node whose target was replaced: that target."""
_BATCH_NORM = torch.ops.aten.batch_norm.default
_PRODUCTS: dict[int, Any] = {2: F.linear, 3: F.conv1d, 4: F.conv2d}
"""By the dimensions of the weight."""
_TRAINING = 5
"""Position of the flag among the arguments of a batch norm."""


def fold_weight(
    weight: Tensor, gamma: Tensor | None, variance: Tensor, epsilon: float, training: bool
) -> Tensor:
    """The weight with the batch norm's factor of each row (rows, ...)."""
    factor = _factor(gamma, variance, epsilon, training)
    return weight * factor.to(weight.dtype).view(-1, *(1,) * (weight.dim() - 1))


def fold_bias(
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
) -> Tensor:
    """The bias behind the folded weight (rows,)."""
    shifted = (-mean if bias is None else bias - mean) * _factor(gamma, variance, epsilon, False)
    return shifted if beta is None else shifted + beta


def _factor(gamma: Tensor | None, variance: Tensor, epsilon: float, training: bool) -> Tensor:
    factor = torch.rsqrt(variance + epsilon)
    if gamma is not None:
        factor = factor * gamma
    # A channel that is switched off gets its gradient through gamma, so the product must not vanish.
    return torch.where(factor == 0, 1, factor) if training else factor


def product_and_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rest: tuple[Any, ...],
    own_bias: Tensor | None,
    norm: tuple[Any, ...],
    count: Tensor | None,
    training: bool,
) -> Tensor:
    """A layer and its batch norm.

    Args:
        x: the input.
        weight: folded and rounded.
        bias: folded.
        rest: stride, padding, dilation, groups.
        own_bias: the layer's, not folded.
        norm: gamma, beta, mean, variance, momentum, epsilon.
        count: the batch norm's number of batches, or None.
        training: the batch norm's mode.
    """
    product = _PRODUCTS[weight.dim()]
    if not training:
        folded: Tensor = product(x, weight, bias.to(weight.dtype), *rest)
        return folded
    gamma, beta, mean, variance, momentum, epsilon = norm
    y = product(x, weight, None, *rest)
    shape = (1, -1, *(1,) * (y.dim() - 2))
    y = (y / _factor(gamma, variance, epsilon, True).view(shape)).to(y.dtype)
    if own_bias is not None:
        y = y + own_bias.to(y.dtype).view(shape)
    count_batch(count, training)
    return F.batch_norm(y, mean, variance, gamma, beta, True, momentum, epsilon)


def count_batch(count: Tensor | None, training: bool) -> None:
    """What ``nn.BatchNorm2d`` does before it normalizes."""
    if training and count is not None:
        count.add_(1)


def fold(module: GraphModule, layers: AbstractSet[str]) -> None:
    """Put the batch norms behind ``layers`` into weight and bias, in the graph, before it is annotated."""
    called = Counter(owner(node) for node in module.graph.nodes if is_product(node))
    once = {name for name, count in called.items() if count == 1}
    for norm in list(module.graph.nodes):
        node = norm.args[0] if norm.target is _BATCH_NORM else None
        if isinstance(node, Node) and _folds(node, norm) and owner(node) in layers & once:
            _fold(module, node, norm)
    module.recompile()


def _folds(node: Node, norm: Node) -> bool:
    plain = is_product(node) and len(node.users) == 1 and norm.args[_TRAINING] is False
    linear = node.target is torch.ops.aten.linear.default
    return plain and norm.args[3] is not None and not (linear and node.meta["val"].dim() != 2)


def _fold(module: GraphModule, node: Node, norm: Node) -> None:
    gamma, beta, mean, variance, _, momentum, epsilon = norm.args[1:8]
    x, weight, *rest = node.args
    own_bias = rest[0] if rest else None
    with module.graph.inserting_before(node):
        new_weight = module.graph.call_function(fold_weight, (weight, gamma, variance, epsilon, False))
        new_bias = module.graph.call_function(fold_bias, (own_bias, gamma, beta, mean, variance, epsilon))
    new_weight.meta["val"] = weight.meta["val"]  # type: ignore[union-attr]
    new_bias.meta["val"] = mean.meta["val"]  # type: ignore[union-attr]
    node.args = (x, new_weight, new_bias, *rest[1:])
    node.meta[NORM] = {"momentum": momentum, "owner": owner(norm), "trains": MODES in norm.meta}
    norm.replace_all_uses_with(node)
    module.graph.erase_node(norm)


def train_norms(module: GraphModule, model: nn.Module) -> None:
    """Let the batch norms of a prepared graph follow the modes of those in ``model``."""
    for node in list(module.graph.nodes):
        if node.meta.get(NORM, {}).get("trains"):
            _train_folded(module, model, node)
        elif node.target is _BATCH_NORM and MODES in node.meta:
            name = owner(node)
            count = _count(module, model, node, name)
            with module.graph.inserting_before(node):
                module.graph.call_function(count_batch, (count, flag(module, name)))


def _train_folded(module: GraphModule, model: nn.Module, node: Node) -> None:
    name = node.meta[NORM]["owner"]
    x, weight, new_bias, *rest = node.args
    new_weight = weight.args[0] if weight.op == "call_module" else weight  # type: ignore[union-attr]
    own_bias, gamma, beta, mean, variance, epsilon = new_bias.args  # type: ignore[union-attr]
    with module.graph.inserting_before(new_weight):  # type: ignore[arg-type]
        training = flag(module, name)
    new_weight.args = (*new_weight.args[:-1], training)  # type: ignore[union-attr]
    norm = (gamma, beta, mean, variance, node.meta[NORM]["momentum"], epsilon)
    count = _count(module, model, node, name)
    node.meta[ORIGINAL] = node.target
    node.target = product_and_norm
    node.args = (x, weight, new_bias, tuple(rest), own_bias, norm, count, training)


def _count(module: GraphModule, model: nn.Module, node: Node, name: str) -> Node | None:
    if getattr(model.get_submodule(name), "num_batches_tracked", None) is None:
        return None
    with module.graph.inserting_before(node):
        return read(module, f"{name}.num_batches_tracked")


def fix_norms(module: GraphModule) -> None:
    """Back to plain layers with folded weights and biases; the opposite of :func:`train_norms`."""
    for node in list(module.graph.nodes):
        if node.target is product_and_norm:
            x, weight, bias, rest = node.args[:4]
            node.target = node.meta.pop(ORIGINAL)
            node.args = (x, weight, bias, *rest)
        elif node.target is count_batch:
            module.graph.erase_node(node)
        elif node.target is fold_weight:
            node.args = (*node.args[:-1], False)


def hide_norms(module: GraphModule) -> None:
    """Take the batch norms that are left out of sight of torchao's patterns for them."""
    for node in module.graph.nodes:
        if node.target is _BATCH_NORM:
            node.target = _hidden


def show_norms(module: GraphModule) -> None:
    """The opposite of :func:`hide_norms`."""
    for node in module.graph.nodes:
        if node.target is _hidden:
            node.target = _BATCH_NORM


def _hidden(*_: Any) -> Tensor:
    raise NotImplementedError("a batch norm between hide_norms and show_norms")
