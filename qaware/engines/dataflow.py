"""What one run of a model computes from what: leaf modules and functions in order, by the tensors between.

Hooks and a function mode record it while the model's own Python runs, so keyword arguments, containers and
control flow are no obstacle; what is recorded is the path that the example takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from qaware.engines.operations import kind_of, place_of


@dataclass(frozen=True)
class Call:
    """One call of a leaf module, or of a function of torch outside of all leaf modules."""

    name: str
    """Name of the module; of a function torch's name for it, e.g. ``torch.Tensor.add``."""
    module: nn.Module | None
    """None for a function."""
    function: Any
    """None for a module."""
    owner: str
    """The module, not a leaf, whose ``forward`` makes the call."""
    visit: int
    """Which of the forward passes of all owners it belongs to."""
    place: str
    """Where in the owner's code it is; only of functions that add or concatenate."""
    inputs: tuple[int, ...]
    """Numbers of the tensors that enter, in order. A tensor that is written in place gets a new number."""
    outputs: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    """The inputs themselves."""
    shape: tuple[int, ...]
    """Of the first output."""


@dataclass(frozen=True)
class Dataflow:
    """All calls of one run."""

    calls: tuple[Call, ...]
    outputs: frozenset[int]
    """What the run returned."""
    scopes: tuple[str, ...]
    """Leaf modules that add or concatenate tensors inside."""
    read: frozenset[int]
    """Parameters, by id, that the model's own code reads, outside of the layers that hold them."""

    def consumers(self, value: int) -> list[Call]:
        """The calls that take a tensor."""
        return [call for call in self.calls if value in call.inputs]

    def of(self, name: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.module is not None and call.name == name]


def record(model: nn.Module, run: Callable[[], Any]) -> Dataflow:
    """The calls that ``run`` makes inside ``model``, which is put into evaluation mode for it.

    Args:
        model: float; parameters and modes are as before afterwards.
        run: calls ``model`` on an example.
    """
    training = {module: module.training for module in model.modules()}
    recorder = _Recorder()
    model.eval()
    try:
        with recorder.hooks(model), torch.no_grad(), recorder:
            result = run()
    finally:
        for module, mode in training.items():
            module.training = mode
    return Dataflow(
        tuple(recorder.calls),
        frozenset(recorder.numbers(result)),
        tuple(recorder.scopes),
        recorder.parameters(),
    )


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []
        """Tensors stay alive, so that no two have the same id."""
        self._next = 0
        self._owners: list[tuple[str, nn.Module | None, int]] = [("", None, 0)]
        self._visits = 0
        self._read: list[Tensor] = []
        self._leaves: list[str] = []
        self.scopes: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every function of torch."""
        if self._leaves and kind_of(func, (args, kwargs)):
            self.scopes.setdefault(self._leaves[-1])
        if self._leaves or getattr(func, "__name__", "") == "__get__":
            return func(*args, **(kwargs or {}))
        tensors = _tensors((args, kwargs))
        self._read += [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        inputs = self.numbers(tensors)
        result = func(*args, **(kwargs or {}))
        if tensors and _tensors(result):
            name = resolve_name(func) or getattr(func, "__name__", str(func))
            owner = self._owners[-1][1]
            joined = owner is not None and kind_of(func, (args, kwargs)) is not None
            place = place_of(owner) if joined and owner is not None else ""
            self._add(name, None, func, inputs, tensors, result, place)
        return result

    @contextlib.contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            enter, leave = self._leaf(name) if _is_leaf(module) else self._container(name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leaf(self, name: str) -> tuple[Any, Any]:
        entered: list[tuple[tuple[int, ...], list[Tensor]]] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            entered.append((self.numbers((args, kwargs)), _tensors((args, kwargs))))
            self._leaves.append(name)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._leaves.pop()
            inputs, tensors = entered.pop()
            if not self._leaves and output is not None:
                self._add(name, module, None, inputs, tensors, output)

        return enter, leave

    def _container(self, name: str) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._visits += 1
            self._owners.append((name, module, self._visits))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._owners.pop()

        return enter, leave

    def parameters(self) -> frozenset[int]:
        """The ids of parameters that functions outside of leaf modules took."""
        return frozenset(id(parameter) for parameter in self._read)

    def numbers(self, values: Any) -> tuple[int, ...]:
        """The number of every tensor in ``values``."""
        return tuple(self._numbers.get(id(t)) or self._new(t) for t in _tensors(values))

    def _new(self, tensor: Tensor) -> int:
        self._next += 1
        self._kept.append(tensor)
        self._numbers[id(tensor)] = self._next
        return self._next

    def _add(
        self,
        name: str,
        module: nn.Module | None,
        function: Any,
        inputs: tuple[int, ...],
        tensors: list[Tensor],
        result: Any,
        place: str = "",
    ) -> None:
        outputs = _tensors(result)
        numbers = tuple(self._new(tensor) for tensor in outputs)
        owner, _, visit = self._owners[-1]
        shape = tuple(outputs[0].shape) if outputs else ()
        self.calls.append(
            Call(name, module, function, owner, visit, place, inputs, numbers, tuple(tensors), shape)
        )


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
