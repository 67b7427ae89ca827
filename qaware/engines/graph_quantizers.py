"""Where an exported graph is rounded: the runtimes' own quantizers say which operators their kernels have,
the plan says which layers, the scheme says how."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qaware.engines.graph_fake_quant import (
    Constructor,
    GraphActivationFakeQuantizer,
    GraphDynamicFakeQuantizer,
    GraphWeightFakeQuantizer,
)
from qaware.engines.graph_fold import fold, hide_norms, show_norms
from qaware.engines.graph_normal import is_product, normalize
from qaware.engines.graph_trace import owner
from qaware.engines.x86 import x86_quantizer
from qaware.errors import QawareError
from qaware.plan import Plan
from qaware.scheme import Scheme

TARGETS = ("executorch", "aoti")
_ATEN = torch.ops.aten
_JOINS = (_ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.cat.default)
_MEANS = (_ATEN.adaptive_avg_pool2d.default, _ATEN.avg_pool2d.default, _ATEN.mean.dim)
"""Operators whose result lies between the values that enter."""
_SAME_VALUES = (
    *(_ATEN.max_pool2d.default, _ATEN.relu.default, _ATEN.relu_.default, _ATEN.dropout.default),
    *(_ATEN.flatten.using_ints, _ATEN.view.default, _ATEN.reshape.default, _ATEN.permute.default),
    *(_ATEN.transpose.int, _ATEN.slice.Tensor, _ATEN.unsqueeze.default, _ATEN.squeeze.dim),
)
"""Operators whose result has, in evaluation, the values that enter, zero, and no others."""


def the_scheme(plan: Plan, target: str) -> Scheme:
    """The scheme that all planned layers share.

    Raises:
        QawareError: a layer has one that the runtime's graph cannot hold, or they differ.
    """
    schemes: dict[Scheme, str] = {}
    for name, decision in plan.quantized.items():
        assert decision.scheme is not None
        problem = _problem(decision.type, decision.scheme, target)
        if problem:
            raise QawareError(
                f"{name}: {decision.scheme.label} cannot be in a graph for {target}: {problem}, "
                "or use engine: eager"
            )
        schemes.setdefault(decision.scheme, name)
    if len(schemes) > 1:
        (one, first), (two, second) = list(schemes.items())[:2]
        raise QawareError(
            f"{second}: {two.label} beside {one.label} of {first}; the graph engine has one scheme for all "
            "layers; give them the same, keep some float, or use engine: eager"
        )
    return next(iter(schemes))


def _problem(kind: str, scheme: Scheme, target: str) -> str | None:
    if kind == "Embedding":
        return "embeddings stay float there; keep it float in the recipe"
    if kind.startswith("Conv") and scheme.activation == "int8-dynamic":
        return "its convolutions take calibrated activations; use activation: int8-static"
    if scheme.bits != 8 or scheme.group_size or scheme.levels != "all":
        return "it has int8 kernels only; use bits: 8 without group_size or levels"
    if scheme.activation == "none":
        return "its kernels take integer activations; use activation: int8-static"
    if not scheme.symmetric or scheme.scale_dtype != "float32":
        return "weights are symmetric with float32 scales; leave symmetric and scale_dtype out"
    if scheme.per_tensor and target == "aoti":
        return "its kernels have a scale for each channel; leave per_tensor out"
    return None


class SelectiveQuantizer(Quantizer):
    """A runtime's quantizer, held to the layers of a plan and to the operations between them."""

    def __init__(self, plan: Plan, target: str) -> None:
        self.layers = plan.quantized.keys()
        self.target = target
        scheme = the_scheme(plan, target)
        make = _xnnpack if target == "executorch" else _x86_inductor
        self.inner, self.annotation = make(scheme)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Batch norms first: runtimes know none, and their patterns are those of layers without."""
        normalize(model)
        fold(model, self.layers)
        transformed: GraphModule = self.inner.transform_for_annotation(model)
        return transformed

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark what stays float as done, and let the runtime's quantizer mark the rest."""
        kept = integer_nodes(model, self.layers)
        constants = {n for node in kept if is_product(node) for n in _behind(node.args[1:])}
        for node in model.graph.nodes:
            if node.op == "call_function" and node not in kept | constants:
                node.meta[Q_ANNOTATION_KEY] = self.annotation(_annotated=True)
        annotated: GraphModule = self.inner.annotate(model)
        return annotated

    def validate(self, model: GraphModule) -> None:
        """The annotations are made; torchao would rewrite the batch norms of float layers next."""
        hide_norms(model)


def integer_nodes(model: GraphModule, layers: Collection[str]) -> set[Node]:
    """The planned layers, and the operations whose inputs are integers anyway: an addition between float
    layers gains nothing from being rounded."""
    kept: set[Node] = set()
    entering = {n.args[0] for n in model.graph.nodes if is_product(n) and owner(n) in layers}
    for node in model.graph.nodes:
        if is_product(node):
            integer = owner(node) in layers
        elif node.target in _JOINS:
            inputs = node.args[0] if node.target is _ATEN.cat.default else node.args[:2]
            integer = all(isinstance(n, Node) and (n in kept or n in entering) for n in inputs)
        else:
            follows = (*_MEANS, *_SAME_VALUES, _ATEN.hardtanh.default)
            source = node.args[0] if node.target in follows else None
            integer = source in kept or source in entering
        if integer:
            kept.add(node)
    return kept


def _behind(arguments: Any) -> Iterator[Node]:
    """All nodes that a weight or bias is computed from: a fold, a mask."""
    for node in tree_leaves(arguments):
        if isinstance(node, Node):
            yield node
            yield from _behind((node.args, node.kwargs))


def insert(module: GraphModule, plan: Plan, target: str) -> GraphModule:
    """``module`` with fake-quantizers, named by torchao.

    Raises:
        QawareError: see :func:`the_scheme`.
    """
    # In the form for training also where nothing is trained: the other folds batch norms into tensors of
    # its own, and those here are folded already.
    prepared: GraphModule = prepare_qat_pt2e(module, SelectiveQuantizer(plan, target))
    show_norms(prepared)
    _look_once(prepared)
    return prepared


def _look_once(prepared: GraphModule) -> None:
    """Where one fake-quantizer rounds a tensor and what is made of it, its observer sees it once."""
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(node.args[0], Node):
            made, quantizer = node.args[0], _quantizer(prepared, node)
            source = next(iter(made.all_input_nodes), node)
            if quantizer is not None and _quantizer(prepared, source) is quantizer:
                if made.target in _SAME_VALUES:
                    node.args = (made, False, False)
                elif made.target in _MEANS:
                    node.args = (made, False)
            if quantizer is not None and made.target is _ATEN.cat.default:
                # What is joined is in the result.
                for part in made.all_input_nodes:
                    if _quantizer(prepared, part) is quantizer:
                        part.args = (part.args[0], False)


def _quantizer(prepared: GraphModule, node: Node) -> Any:
    called = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
    return called if isinstance(called, GraphActivationFakeQuantizer) else None


def _specs(scheme: Scheme, unsigned: bool) -> tuple[QuantizationSpec, QuantizationSpec]:
    """Of activations and of weights."""
    dynamic = scheme.activation == "int8-dynamic"

    def activation() -> Any:
        if dynamic:
            return GraphDynamicFakeQuantizer(unsigned)
        return GraphActivationFakeQuantizer(scheme.observer, unsigned)

    low = 0 if unsigned else -128
    return (
        QuantizationSpec(
            dtype=torch.uint8 if unsigned else torch.int8,
            observer_or_fake_quant_ctr=Constructor(activation),  # type: ignore[arg-type]
            quant_min=low,
            quant_max=low + 255,
            qscheme=torch.per_tensor_affine,
            is_dynamic=dynamic,
        ),
        QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=Constructor(lambda: GraphWeightFakeQuantizer(scheme)),  # type: ignore[arg-type]
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_tensor_symmetric if scheme.per_tensor else torch.per_channel_symmetric,
            ch_axis=0,
        ),
    )


def _xnnpack(scheme: Scheme) -> tuple[Any, Callable[..., Any]]:
    try:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    except ImportError as error:
        raise QawareError("executorch: is not installed; pip install qaware[executorch]") from error
    from torchao.quantization.pt2e.quantizer import QuantizationConfig

    activation, weight = _specs(scheme, unsigned=False)
    output = None if activation.is_dynamic else activation
    config = QuantizationConfig(activation, output, weight, None, False)
    quantizer = XNNPACKQuantizer().set_global(config)
    # Those of batch norms, which are folded by now; looking for them takes seconds.
    quantizer.SUPPORTED_PATTERNS = [p for p in quantizer.SUPPORTED_PATTERNS if not p.is_qat]
    return quantizer, QuantizationAnnotation


def _x86_inductor(scheme: Scheme) -> tuple[Any, Callable[..., Any]]:
    x86 = x86_quantizer()

    activation, weight = _specs(scheme, unsigned=True)
    config = x86.QuantizationConfig(activation, activation, weight, None, False)
    return x86.X86InductorQuantizer().set_global(config), x86._X86InductorQuantizationAnnotation
