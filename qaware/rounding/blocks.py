"""The blocks of a model: the parts of it that run one after the other, found by structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)
_MOST = 0.75
"""Share of the layers that one block may have; where it has more, the blocks are inside of it."""


def find_blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Modules that may be run one by one, none inside another, in the order in which the model lists them.

    They are the items of the outermost ``ModuleList`` or ``Sequential`` that has two or more with layers.

    Args:
        model: any module.
        names: of the layers that the blocks must have.
    """
    return _inside(model, "", names)


def inside(name: str, block: str) -> bool:
    """Whether layer ``name`` is ``block`` or in it."""
    return name == block or name.startswith(f"{block}.")


def list_of(block: str) -> str:
    """The name of the list that a block is an item of; empty for the model itself."""
    return block.rpartition(".")[0]


def _inside(module: nn.Module, path: str, names: Sequence[str]) -> list[str]:
    children = {f"{path}.{key}" if path else key: child for key, child in module.named_children()}
    layers = {name: [n for n in names if inside(n, name)] for name in children}
    layers = {name: found for name, found in layers.items() if found}
    if isinstance(module, _LISTS) and len(layers) > 1:
        most = max(len(found) for found in layers.values())
        if most <= _MOST * sum(len(found) for found in layers.values()):
            return list(layers)
    return [block for name, found in layers.items() for block in _inside(children[name], name, found)]
