"""Round the results of functions that a module's own ``forward`` calls: residual additions, concatenations.

PyTorch's eager quantization asks the user to write ``FloatFunctional`` for them. Here the module's class
is swapped for one whose ``forward`` runs under a function mode, which hands each such result to a submodule
``qaware_operations.<kind>_<index>``, so neither the model's code nor the names of its modules change.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qaware.engines.activation_fake_quant import StaticFakeQuantizer
from qaware.layout import OperationSite

_KINDS: dict[Any, str] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__), "add"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
}
_RELUS = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu)
_CHILD = "qaware_operations"
_WATCHERS = ("operation", "__torch_function__")
"""Between the model's code and the question where it is."""
_running = threading.local()


def kind_of(function: Any, args: Any) -> str | None:
    """``add`` or ``cat`` where ``function`` joins floating-point tensors; a scalar added is neither."""
    kind = _KINDS.get(function)
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)] if kind else []
    return kind if len(tensors) > 1 and all(t.is_floating_point() for t in tensors) else None


def place_of(owner: nn.Module) -> str:
    """Where the code that is running was called from ``owner.forward``: functions and lines in them."""
    forward = inspect.unwrap(_written(owner).forward).__code__
    frame: Any = sys._getframe(1)
    while frame.f_code.co_name in _WATCHERS:
        frame = frame.f_back
    steps = []
    while frame is not None and frame.f_code.co_filename not in (__file__, nn.modules.module.__file__):
        steps.append(f"{frame.f_code.co_name}+{frame.f_lineno - frame.f_code.co_firstlineno}")
        frame = None if frame.f_code is forward else frame.f_back
    return ">".join(reversed(steps))


def _written(module: nn.Module) -> type[nn.Module]:
    """The class that the user wrote."""
    return type(module).__bases__[1] if isinstance(module, Scoped) else type(module)


def activate(x: Tensor, relu: bool, ceiling: float | None) -> Tensor:
    """The activation function that is fused to a site: none, ReLU, or a ReLU that ends at ``ceiling``."""
    if not relu:
        return x
    return torch.relu(x) if ceiling is None else torch.clamp(x, 0.0, ceiling)


def activate_and_round(x: Tensor, relu: bool, ceiling: float | None, quantizer: nn.Module | None) -> Tensor:
    """:func:`activate`, then ``quantizer``; a ReLU without an end is left to one that rounds in training."""
    if relu and ceiling is None and isinstance(quantizer, StaticFakeQuantizer):
        rounded: Tensor = quantizer(x, relu=True)
        return rounded
    x = activate(x, relu, ceiling)
    return x if quantizer is None else quantizer(x)


def note_rectified(x: Tensor) -> Tensor:
    """``x``, with a note that it is not negative: the model's own ReLU, which follows, has nothing to do.

    Its gradient would be 0 where ``x`` was rounded to 0, too. Left out, the gradient is that of one ReLU, the
    one before the rounding, as where PyTorch's quantization-aware training fuses one.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x.rectified = x._version  # type: ignore[attr-defined]
    return x


def _is_rectified(x: Any) -> bool:
    noted: int | None = getattr(x, "rectified", None)
    return noted is not None and noted == x._version


class Operation(nn.Module):
    """What happens to one result: an activation function, then rounding."""

    def __init__(self, quantizer: nn.Module, site: OperationSite) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        rounded = activate_and_round(x, self.site.relu, self.site.ceiling, self.quantizer)
        return note_rectified(rounded) if self.site.relu else rounded


class Scoped(nn.Module):
    """Base of the classes that :func:`add_operation` makes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, with its functions watched."""
        with _scope(self):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be imported by its name, so a copy, in another process too, makes it again.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (_written(self),), *reduced[2:])


def add_operation(owner: nn.Module, site: OperationSite, quantizer: nn.Module) -> None:
    """Round one result in ``owner``, in place; ``quantizer`` takes and gives a tensor."""
    add_scope(owner)
    operation = Operation(quantizer, site)
    operations(owner)[f"{site.kind}_{site.index}"] = operation.train(owner.training)


def add_scope(owner: nn.Module) -> None:
    """Count the functions that ``owner`` calls apart from those of the module that calls it, in place."""
    if not isinstance(owner, Scoped):
        owner.__class__ = _scoped_class(type(owner))
        owner.add_module(_CHILD, nn.ModuleDict())


def remove_scope(owner: nn.Module) -> None:
    """Undo :func:`add_scope`, in place."""
    if isinstance(owner, Scoped):
        object.__setattr__(owner, "__class__", _written(owner))
        del owner._modules[_CHILD]


def operations(owner: nn.Module) -> nn.ModuleDict:
    """The operations of a module by kind and index; empty where none is rounded."""
    children = owner._modules.get(_CHILD) if isinstance(owner, Scoped) else None
    return children if isinstance(children, nn.ModuleDict) else nn.ModuleDict()


_classes: dict[type, type] = {}


def _scoped_class(cls: type) -> type:
    if cls not in _classes:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _classes[cls] = type(cls.__name__, (Scoped, cls), names)
    return _classes[cls]


def _new(cls: type) -> Any:
    return object.__new__(_scoped_class(cls))


def _scope(owner: nn.Module) -> AbstractContextManager[None]:
    """Functions called from here on, but not in a scope inside, belong to ``owner``."""
    return _frame(_Frame(owner))


def unwatched() -> AbstractContextManager[None]:
    """Functions called from here on are an engine's own, not the model's."""
    if not getattr(_running, "stack", []):
        return nullcontext()
    if torch.compiler.is_compiling():
        return _frame(_Frame(None))
    return torch._C.DisableTorchFunction()  # a call of Python less for each of them


class _Frame:
    """One forward pass of an owner: its operations, and the calls that were made so far."""

    def __init__(self, owner: nn.Module | None) -> None:
        self.owner = owner
        found = [] if owner is None else [m for m in operations(owner).values() if isinstance(m, Operation)]
        self.placed = {(m.site.kind, m.site.place, m.site.turn): m for m in found}
        self.numbered = {(m.site.kind, m.site.index): m for m in found}
        self.counted = any(not m.site.place for m in found)
        self.calls: Counter[Any] = Counter()

    def operation(self, kind: str) -> Operation | None:
        """The operation of the call of ``kind`` that is being made."""
        if self.owner is None or not self.placed:
            return None
        if self.counted or torch.compiler.is_compiling():  # which sees no frames
            key: Any = kind
            self.calls[key] += 1
            return self.numbered.get((kind, self.calls[key] - 1))
        key = kind, place_of(self.owner)
        self.calls[key] += 1
        return self.placed.get((*key, self.calls[key] - 1))


@contextmanager
def _frame(frame: _Frame) -> Iterator[None]:
    stack: list[_Frame] = getattr(_running, "stack", [])
    _running.stack = stack
    stack.append(frame)
    try:
        if len(stack) > 1:
            yield
        else:
            with _Watch():
                yield
    finally:
        stack.pop()


class _Watch(TorchFunctionMode):
    """Rounds the results of the innermost scope."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every function of torch."""
        kwargs = kwargs or {}
        if func in _RELUS and args and _is_rectified(args[0]):
            return args[0]
        kind = kind_of(func, (args, kwargs))
        operation = None if kind is None else _running.stack[-1].operation(kind)
        if operation is None:
            return func(*args, **kwargs)
        # Not in place: the result is another tensor anyway, and tracers know no copy into an old one.
        return operation(torch.add(*args, **kwargs) if func is Tensor.add_ else func(*args, **kwargs))
