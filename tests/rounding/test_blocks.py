"""Where the blocks of a model are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from qaware.rounding.blocks import find_blocks, inside, list_of


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class Decoder(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList(block() for _ in range(count))


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(4, 4), nn.Sequential(block(), block()), block()


CASES: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (lambda: Decoder(3), ["layers.0", "layers.1", "layers.2"]),
    (lambda: Decoder(1), ["layers.0.0", "layers.0.2"]),
    (lambda: nn.Sequential(nn.Embedding(4, 4), Decoder(2), nn.Linear(4, 4)), ["1.layers.0", "1.layers.1"]),
    (Stages, ["one.0", "one.1", "two.0", "two.2"]),
    (lambda: nn.Linear(4, 4), []),
]


@pytest.mark.parametrize(("make", "expected"), CASES)
def test_blocks_are_the_items_of_the_outermost_lists(
    make: Callable[[], nn.Module], expected: list[str]
) -> None:
    model = make()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert find_blocks(model, names) == expected


def test_a_list_without_layers_is_none() -> None:
    assert find_blocks(Decoder(2), ["layers.1.0", "layers.1.2", "head"]) == ["layers.1.0", "layers.1.2"]


def test_names() -> None:
    assert inside("layers.1.0", "layers.1")
    assert inside("layers.1", "layers.1")
    assert not inside("layers.10", "layers.1")
    assert list_of("model.layers.1") == "model.layers"
    assert list_of("1") == ""
