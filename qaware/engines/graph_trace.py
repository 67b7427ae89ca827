"""From a module to a graph of ATen operators that still reads the module's own tensors and modes.

``torch.export`` fixes the mode: dropout and batch norm become what they are in training or in evaluation.
torchao switches them afterwards by rewriting patterns, which resets dropout's probability and batch norm's
momentum and epsilon to the defaults. Here both modes are exported and compared: where a literal differs,
the graph reads the ``training`` flag of the module that it came from, so ``train()``, ``eval()`` and a
single frozen layer work as they do in the module; where anything else differs, the model is refused.
"""

from __future__ import annotations

import inspect
import itertools
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_flatten, tree_unflatten

from qaware.engines.example import Example
from qaware.engines.graph_normal import complete
from qaware.errors import QawareError

MODES = "qaware_modes"
"""Key in a node's ``meta``: position among its flattened arguments, to the values in training and in
evaluation."""
MOST = 2**16
"""Largest batch of an exported graph."""
_PLAIN = (bool, int, float, str, type(None))
_COUNTER = "num_batches_tracked"
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "/torch/", "_export/")


def describe(model: nn.Module, example: Example) -> list[dict[str, Any]]:
    """The inputs as plain data: ``keyword`` or None, then ``shape``, ``dtype`` and ``batch`` (whether the
    first axis is the batch) of a tensor, or the ``value`` of anything else.

    Raises:
        QawareError: an input is neither a tensor nor plain, or no input has a batch.
    """
    given = [(None, value) for value in example.args] + list(example.kwargs.items())
    batch = next((v.shape[0] for _, v in given if isinstance(v, Tensor) and v.dim()), None)
    if batch is None:
        raise QawareError(f"{type(model).__name__}: no input is a tensor with a batch axis; give one")
    return [_describe(keyword, value, batch) for keyword, value in given]


def _describe(keyword: str | None, value: Any, batch: int) -> dict[str, Any]:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        first = value.dim() > 0 and value.shape[0] == batch
        return {"keyword": keyword, "shape": list(value.shape), "dtype": dtype, "batch": first}
    if isinstance(value, _PLAIN):
        return {"keyword": keyword, "value": value}
    raise QawareError(
        f"{keyword or 'input'}: a {type(value).__name__} cannot enter an exported graph; "
        "pass tensors and plain values, or use engine: eager"
    )


def trace(model: nn.Module, inputs: list[dict[str, Any]], training: bool) -> GraphModule:
    """The graph of ``model``, whose placeholders are the tensors of ``inputs`` in order.

    Args:
        model: not changed.
        inputs: see :func:`describe`.
        training: whether the graph must be able to train; differences go to ``meta[MODES]``.

    Raises:
        QawareError: the model's control flow depends on data or on ``self.training``.
    """
    evaluated = _export(model, inputs, training=False)
    if training:
        _compare(model, evaluated, _export(model, inputs, training=True))
    return evaluated


def _export(model: nn.Module, inputs: list[dict[str, Any]], training: bool) -> GraphModule:
    batch = torch.export.Dim("batch", min=1, max=MOST)
    device = next(model.parameters()).device
    args, kwargs = split(inputs, [_stand_in(spec, device) for spec in inputs])
    shapes, named = split(inputs, [{0: batch} if spec.get("batch") else None for spec in inputs])
    try:
        with _mode(model, training), _every_layer(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # By the parameters' own names, as torch.export wants them.
            dynamic = inspect.signature(model.forward).bind(*shapes, **named).arguments
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # whatever the model's own code raises when it is traced
        raise QawareError(_explain(model, error)) from error
    module: Any = program.module(check_guards=False)
    module.graph.set_codegen(CodeGen())  # flat arguments and results; the caller knows their structure
    module.recompile()
    return cast("GraphModule", module)


def split(inputs: list[dict[str, Any]], values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    pairs = list(zip(inputs, values, strict=True))
    positional = tuple(value for spec, value in pairs if spec["keyword"] is None)
    return positional, {spec["keyword"]: value for spec, value in pairs if spec["keyword"] is not None}


def _stand_in(spec: Mapping[str, Any], device: torch.device) -> Any:
    if "value" in spec:
        return spec["value"]
    shape = list(spec["shape"])
    if spec["batch"]:
        shape[0] = 2  # a size of 1 would be taken for a constant
    return torch.zeros(shape, dtype=getattr(torch, spec["dtype"]), device=device)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All flags at once, past a ``train()`` of the user's that keeps some layers as they are."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _every_layer() -> Iterator[None]:
    """PyTorch's fused encoder layer would hide the layers inside."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _explain(model: nn.Module, error: Exception) -> str:
    text = str(error)
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]
    own = [place for place in (frames + found) if not any(part in place[0] for part in _FOREIGN)]
    where = f"{own[-1][0]}:{own[-1][1]}, in {own[-1][2]}: " if own else ""
    reason = " ".join(text.split("\n\n")[0].split())[:300]
    return (
        f"{type(model).__name__}: cannot be exported as a graph ({where}{reason}); write it without control "
        "flow that depends on data or on the size of the batch, or use engine: eager"
    )


def _compare(model: nn.Module, evaluated: GraphModule, trained: GraphModule) -> None:
    """Write into ``evaluated`` what is different in training.

    Raises:
        QawareError: more than literals differ.
    """
    pairs = itertools.zip_longest(_calls(evaluated), _calls(trained))
    for one, other in pairs:
        if one is None or other is None or (one.op, one.target) != (other.op, other.target):
            node = one or other
            raise QawareError(
                f"{type(model).__name__}: {node.target} runs in one of training and evaluation only "
                f"({_line(node)}), which one graph cannot do; use engine: eager"
            )
        if len(one.args) != len(other.args):
            complete(one)
            complete(other)
        values = zip(_literals(one), _literals(other), strict=True)
        modes = {i: (trained, usual) for i, (usual, trained) in enumerate(values) if usual != trained}
        if modes:
            one.meta[MODES] = modes


def _calls(module: GraphModule) -> list[Node]:
    """What the graph does, but for counting batches, which is done in training only."""
    return [
        node
        for node in module.graph.nodes
        if node.op in ("call_function", "call_module")
        and not (node.target is torch.ops.aten.add_.Tensor and _COUNTER in str(node.args[0]))
    ]


def _literals(node: Node) -> list[Any]:
    """The flattened arguments; other nodes are all the same, as their order is compared anyway."""
    leaves = tree_flatten((node.args, node.kwargs))[0]
    return [None if isinstance(leaf, Node) else leaf for leaf in leaves]


def _line(node: Node) -> str:
    lines = str(node.meta.get("stack_trace", "")).strip().splitlines()
    own = [line.strip() for line in lines if "File" in line and not any(part in line for part in _FOREIGN)]
    return own[-1] if own else "no source line"


def owner(node: Node) -> str:
    """The module whose forward called ``node``, by its name in the model; empty for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def choose(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """A literal that depends on the mode."""
    return in_training if training else in_evaluation


def follow_modes(module: GraphModule) -> None:
    """Let every literal that depends on the mode read it from the module that owns it."""
    for node in list(module.graph.nodes):
        modes = node.meta.get(MODES, {})
        leaves, structure = tree_flatten((node.args, node.kwargs))
        for index, (in_training, in_evaluation) in modes.items():
            with module.graph.inserting_before(node):
                leaves[index] = module.graph.call_function(
                    choose, (flag(module, owner(node)), in_training, in_evaluation)
                )
        if modes:
            node.args, node.kwargs = tree_unflatten(leaves, structure)


def flag(module: GraphModule, name: str) -> Node:
    """A node that reads the ``training`` flag of a module, as it is at the time of the call."""
    return read(module, f"{name}.training" if name else "training")


def read(module: GraphModule, name: str) -> Node:
    """A node that reads an attribute of the model, by its full name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the graph's own module may not have it
        return module.graph.get_attr(name)


def fix_modes(module: GraphModule) -> None:
    """Back to the literals of evaluation."""
    for node in list(module.graph.nodes):
        if node.target is choose:
            _replace(node, node.args[2])
            module.graph.erase_node(node)


def _replace(node: Node, value: Any) -> None:
    """Put a literal where ``node`` is used."""
    for user in list(node.users):
        leaves, structure = tree_flatten((user.args, user.kwargs))
        user.args, user.kwargs = tree_unflatten([value if x is node else x for x in leaves], structure)
