"""A module whose forward runs a graph, and stays what it is otherwise.

The graph owns nothing: it reads parameters, buffers, modes and fake-quantizers from the module by their
names. So optimizers, averages, pruning, ``.to()``, DDP, checkpoints and copies see an ordinary module.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from qaware.engines.graph_trace import split
from qaware.errors import QawareError
from qaware.plan import Plan

CHILD = "qaware_graph"
"""Submodule with the constants of the graph, and the fake-quantizers that belong to no layer."""
_HELD = "qaware_program"


class Program:
    """A graph that can be called with a module in the place of ``self``."""

    def __init__(
        self,
        plan: Plan,
        graph: Graph | None,
        structure: TreeSpec | None,
        meta: dict[str, Any],
        remake: Callable[[nn.Module, Plan], Program] | None,
    ) -> None:
        """
        Args:
            plan: with the layout that the graph can be made again from.
            graph: with flat arguments and results; None to make it when it is needed.
            structure: of the results.
            meta: of the graph's module, which torchao reads when it converts.
            remake: makes the program of a module again from the plan; None for a converted one.
        """
        self.plan = plan
        self.graph = graph
        self.structure = structure
        self.meta = meta
        self.remake = remake
        self._device = torch.device("cpu")
        self._run: Callable[..., Any] | None = None

    def __call__(self, module: nn.Module, values: list[Any]) -> Any:
        """What ``module`` gives for its flat inputs."""
        if self._run is None:
            self._run = self._compile()
        assert self.structure is not None
        return tree_unflatten(list(self._run(module, *values)), self.structure)

    def _compile(self) -> Callable[..., Any]:
        assert self.graph is not None
        code = self.graph.python_code("self")
        names = dict(code.globals)
        exec(compile(code.src, "<qaware graph>", "exec"), names)
        run: Callable[..., Any] = names["forward"]
        return run

    def move(self, device: torch.device) -> None:
        """Make tensors on ``device`` where the model's own code asks its input for the device: the export
        wrote down the one that was there then."""
        if device != self._device and self.graph is not None:
            for node in self.graph.nodes:
                values, structure = tree_flatten((node.args, node.kwargs))
                if any(isinstance(value, torch.device) for value in values):
                    moved = [device if isinstance(value, torch.device) else value for value in values]
                    node.args, node.kwargs = tree_unflatten(moved, structure)
            self._run = None
        self._device = device

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        # The plan is immutable, and nodes share what they know of tensors.
        duplicate = Program(self.plan, copy.deepcopy(self.graph), self.structure, self.meta, self.remake)
        duplicate._device = self._device
        memo[id(self)] = duplicate
        return duplicate

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be pickled; another process makes its own from the plan."""
        if self.remake is None:
            raise QawareError(
                "graph: a converted model cannot be pickled or saved; export it, or keep the checkpoint of "
                "the prepared one"
            )
        return {"plan": self.plan, "remake": self.remake}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["plan"], None, None, {}, state["remake"])  # type: ignore[misc]


class Graphed(nn.Module):
    """Base of the classes that :func:`become_graph` makes."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be imported by its name, so a copy, in another process too, makes it again.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (float_class(self),), *reduced[2:])


def program(module: nn.Module) -> Program:
    """The graph of a module that is one, made again where it came from another process without."""
    held: Program = module.__dict__[_HELD]
    if held.graph is None:
        assert held.remake is not None
        held = module.__dict__[_HELD] = held.remake(module, held.plan)
    held.move(next(module.parameters()).device)
    return held


def become_graph(module: nn.Module, held: Program) -> None:
    """Run ``held`` in the place of the forward of ``module``, in place."""
    if not isinstance(module, Graphed):
        module.__class__ = _graphed_class(type(module))
    module.__dict__[_HELD] = held


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user wrote."""
    cls: type[nn.Module] = type(module).__bases__[1] if isinstance(module, Graphed) else type(module)
    return cls


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    held = program(self)
    return held(self, _flat(self, held.plan, args, kwargs))


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _graphed_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _classes:
        names = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "forward": functools.wraps(cls.forward)(_forward),  # with the signature of the user's
        }
        _classes[cls] = type(cls.__name__, (Graphed, cls), names)
    return _classes[cls]


def _new(cls: type[nn.Module]) -> Any:
    return object.__new__(_graphed_class(cls))


def _flat(module: nn.Module, plan: Plan, args: Any, kwargs: Any) -> list[Any]:
    """The arguments in the order of the graph's: those of the example, each with a value."""
    inputs = graph_data(plan)["inputs"]
    signature = inspect.signature(float_class(module).forward)
    slots, named = split(inputs, list(range(len(inputs))))
    wanted = signature.bind(None, *slots, **named).arguments
    given = signature.bind(None, *args, **kwargs)
    given.apply_defaults()
    values: list[Any] = [inspect.Parameter.empty] * len(inputs)
    for name, value in given.arguments.items():
        default = signature.parameters[name].default
        if name in wanted:
            _place(wanted[name], value, values)
        elif value not in ((), {}) and value is not default:
            raise _wrong(module, name, "the example had none")
    for spec, value in zip(inputs, values, strict=True):
        if "value" in spec and value != spec["value"]:
            raise _wrong(module, spec["keyword"] or "argument", f"the example had {spec['value']!r}")
        if "shape" in spec and not isinstance(value, Tensor):
            raise _wrong(module, spec["keyword"] or "argument", "the example had a tensor")
    return values


def _place(slot: Any, value: Any, values: list[Any]) -> None:
    """Put ``value`` at the position ``slot``, or several where ``*args`` or ``**kwargs`` catch them."""
    if isinstance(slot, int):
        values[slot] = value
    elif isinstance(slot, dict):
        for key, inner in slot.items():
            _place(inner, value.get(key), values)
    elif slot is not None:
        for inner, one in zip(slot, value, strict=False):
            _place(inner, one, values)


def _wrong(module: nn.Module, name: str, what: str) -> QawareError:
    return QawareError(
        f"{type(module).__name__}.forward: {name} is not what the graph was made for ({what}); call it like "
        "the example, or use engine: eager"
    )


def graph_data(plan: Plan) -> Mapping[str, Any]:
    """The graph engine's part of a plan."""
    if plan.layout is None or plan.layout.graph is None:
        raise QawareError("plan: has no layout of the graph engine; call GraphEngine.lay_out() first")
    return plan.layout.graph
