"""Where a scheme is fast that the runtimes here unpack."""

from __future__ import annotations

import pytest
from torch import nn

from qaware.hardware import fast_on, hardware_notes
from qaware.plan import Decision
from qaware.recipe import Recipe
from qaware.scheme import Scheme

DYNAMIC = "int8-dynamic"


@pytest.mark.parametrize(
    ("type_", "scheme", "words"),
    [
        ("Linear", Scheme(3, 128, DYNAMIC), None),
        ("Linear", Scheme(4, 0, DYNAMIC), None),
        ("Linear", Scheme(8, 0, DYNAMIC), None),
        ("Linear", Scheme(4, 32), None),
        ("Linear", Scheme(16), None),
        ("Linear", Scheme(4, 0, "int8-static"), None),
        ("Linear", Scheme(3, 16, DYNAMIC), "fast on ARM CPUs with torchao's low-bit kernels"),
        ("Linear", Scheme(5, 128, DYNAMIC), "fast on ARM CPUs"),
        ("Linear", Scheme(4, 128, DYNAMIC, symmetric=False), "fast on ARM CPUs"),
        ("Linear", Scheme(5, 8, DYNAMIC), "unpacked first everywhere; groups of a multiple of 16"),
        ("Linear", Scheme(4, 64, symmetric=False), "fast on Apple's GPUs, and CUDA's"),
        ("Linear", Scheme(3, 64, symmetric=False), "fast on Apple's GPUs with"),
        ("Linear", Scheme(3, 16, symmetric=False), "groups of 32, 64, 128, 256 are fast on GPUs"),
        ("Embedding", Scheme(2, 32, symmetric=False), "fast on ARM CPUs"),
        ("Embedding", Scheme(2, 16, symmetric=False), "groups of a multiple of 32 are fast on ARM CPUs"),
        ("Embedding", Scheme(4, 32), None),
        ("Conv2d", Scheme(4), None),
    ],
)
def test_by_kind(type_: str, scheme: Scheme, words: str | None) -> None:
    found = fast_on(Decision("w", "m", type_, (64, 256), None, scheme, "rule"))
    assert (found is None) if words is None else words in (found or "")


def test_layers_that_are_alike_share_a_line() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 8), nn.LayerNorm(8))
    recipe = {"linear:a8wxdq": {"bitwidth": 5, "groupsize": 32}, "embedding": {}}
    assert hardware_notes(Recipe.load(recipe).match(model)) == [
        "Linear int5 g32 + int8-dynamic: fast on ARM CPUs with torchao's low-bit kernels; elsewhere unpacked "
        "first (2 layers)"
    ]
    assert hardware_notes(Recipe.load("int8-dynamic").match(model)) == []
