"""Run a call without the blocks that are finished: they give what they gave, and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qaware.rounding.blocks import list_of
from qaware.rounding.recording import Call
from qaware.rounding.replaying import Enough

Given = dict[str, Any]
"""What the last finished block of each list gives in one call, by the name of the list."""


@contextmanager
def skipped(model: nn.Module, finished: Mapping[str, str], given: Given) -> Iterator[None]:
    """Inside, finished blocks do not run. Each gives what the last one of its list gives: only that reaches a
    block that runs, where the blocks of a list take what the one before gives (see :func:`chains`).

    Args:
        model: any module.
        finished: blocks, each with its list.
        given: for the call that is run.
    """
    with _instead(model, {block: _giving(given[where]) for block, where in finished.items()}):
        yield


@torch.no_grad()
def output_of(model: nn.Module, call: Call, block: str) -> Any:
    """What ``block`` gives in ``call``, which ends there; an own copy.

    Raises:
        LookupError: it does not run.
    """
    found: list[Any] = []
    module = model.get_submodule(block)
    forward = module.forward

    def look(*args: Any, **kwargs: Any) -> Any:
        found.append(_copied(forward(*args, **kwargs)))
        raise Enough

    with _instead(model, {block: look}):
        try:
            call.run(model)
        except Enough as enough:
            enough.forget()
            return found[0]
    raise LookupError(block)


def equal(a: Any, b: Any) -> bool:
    """Whether two outputs have the same tensors, bit for bit."""
    ours, theirs = (_tensors(x) for x in (a, b))
    return len(ours) == len(theirs) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(torch.equal(x, y))
        for x, y in zip(ours, theirs, strict=True)
    )


@torch.no_grad()
def chains(model: nn.Module, call: Call, blocks: list[str]) -> bool:
    """Whether the blocks can be run one by one: each from what the one before gave, with the rest of the
    model between them, and the last gives, bit for bit, what it gives in one run of all.

    Args:
        model: any module.
        call: that is tried.
        blocks: in the order in which they run.
    """
    last = {list_of(block): block for block in blocks}
    try:
        expected = {where: output_of(model, call, block) for where, block in last.items()}
        finished: dict[str, str] = {}
        given: Given = {}
        for block in blocks:
            with skipped(model, finished, given):
                output = output_of(model, call, block)
            finished[block], given[list_of(block)] = list_of(block), output
    except Exception:  # whatever the code between the blocks makes of a stand-in
        return False
    return all(equal(given[where], output) for where, output in expected.items())


@contextmanager
def _instead(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, the modules of these names call the functions instead of their ``forward``; hooks stay."""
    before = {}
    for name, function in functions.items():
        attributes = vars(model.get_submodule(name))
        before[name] = attributes, attributes.get("forward")
        attributes["forward"] = function
    try:
        yield
    finally:
        for attributes, forward in before.values():
            attributes.pop("forward")
            if forward is not None:
                attributes["forward"] = forward


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _copied(output)  # as the model may go on to change it in place


def _copied(output: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, output)


def _tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, output)
    return found
