"""Rewritten programs compute the same, from operators that XNNPACK takes. Nothing is lowered here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qaware.exporters.executorch_rewrite import CONSTANT, rewritten

pytest.importorskip("executorch.exir")


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def both_ways(x: Tensor) -> Tensor:
    return x.view(1, x.shape[1], 4, -1).transpose(1, 2).transpose(2, 1).unsqueeze(1).relu()


REWRITTEN = {
    "the mean of RMSNorm": norm,
    "the mean over an axis by its number": lambda x: x.mean(2, keepdim=True),
    "a rotated half": rotated,
    "a repeated half": lambda x: torch.cat((x, x), dim=-1),
}
LEFT = {
    "a mean over the tokens": lambda x: x.mean(1, keepdim=True),
    "a mean that drops its axis": lambda x: x.mean(-1),
    "float64": lambda x: x.double().mean(-1, keepdim=True),
    "other halves": lambda x: torch.cat((-x[..., 8:], x[..., :24]), dim=-1),
    "halves in their order": lambda x: torch.cat((-x[..., :16], x[..., 16:]), dim=-1),
    "halves of two tensors": lambda x: torch.cat((-x[..., 16:], x.relu()[..., :16]), dim=-1),
    "halves one below the other": lambda x: torch.cat((-x[..., 16:], x[..., :16]), dim=1),
    "copies one below the other": lambda x: torch.cat((x, x), dim=1),
}


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def program(function: Any) -> Any:
    """Of (1, S, 32), rewritten; checked to compute what ``function`` does, for other lengths too."""
    length = torch.export.Dim("length", min=1, max=64)
    made = torch.export.export(
        Function(function), (torch.randn(1, 5, 32),), dynamic_shapes=({1: length},), strict=False
    )
    made = rewritten(made)
    for count in (1, 2, 7, 64):
        x = torch.randn(1, count, 32)
        torch.testing.assert_close(made.module()(x), function(x), rtol=1e-5, atol=1e-6)
    return made


def operators(made: Any) -> list[str]:
    calls = [node for node in made.graph.nodes if node.op == "call_function"]
    return [str(node.target).removeprefix("aten.") for node in calls]


@pytest.mark.parametrize("name", REWRITTEN)
def test_sums_and_moves_are_products(name: str) -> None:
    found = operators(program(REWRITTEN[name]))
    assert "linear.default" in found
    assert not {"mean.dim", "slice.Tensor", "cat.default"} & set(found)


@pytest.mark.parametrize("name", LEFT)
def test_what_only_looks_like_one_is_left(name: str) -> None:
    assert "linear.default" not in operators(program(LEFT[name]))


def test_layers_share_their_constants() -> None:
    made = program(lambda x: rotated(norm(norm(rotated(x)))))
    assert sum(name.startswith(CONSTANT) for name in made.state_dict) == 2


def test_reshapes_have_no_symbols_and_transposes_cancel() -> None:
    made = program(both_ways)
    views = [node for node in made.graph.nodes if "view" in str(node.target)]
    assert [node.args[1] for node in views] == [[1, -1, 4, 8], [1, 1, -1, 4, 8]]
    assert not any("transpose" in name or "unsqueeze" in name for name in operators(made))


def test_other_transposes_stay() -> None:
    made = program(lambda x: x[None].transpose(1, 2).transpose(2, 3).relu())
    assert operators(made).count("transpose.int") == 2
