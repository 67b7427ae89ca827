"""A grid as rounding methods see it is that of the layer's own fake-quantizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounded import SCHEMES, grid, name_of, weights

from qaware.scheme import Scheme


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_rounding_is_that_of_the_layer(scheme: dict[str, Any]) -> None:
    made, weight = grid(**scheme), weights()
    scale, zero_point = made.qparams(weight)
    made.quantizer.config.scale_precision = torch.float32  # so that nothing is divided in half precision
    made.quantizer.fixed = scale, zero_point
    assert torch.equal(made.round(weight, scale, zero_point), made.quantizer(weight))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_blocks_and_back(scheme: dict[str, Any]) -> None:
    made, weight = grid(**scheme), weights()
    blocks = made.blocks(weight)
    scale, zero_point = made.qparams(weight)
    assert torch.equal(made.unblock(scale.reshape(-1, 1)[: len(blocks)], weight), scale)
    assert blocks.shape[1] == (weight.numel() if made.scheme.per_tensor else made.scheme.block(64))
    zeros = torch.zeros_like(blocks[:, :1], dtype=torch.int32)
    unblocked = made.round(weight, scale, torch.zeros_like(zero_point))
    flat = scale.reshape(-1, 1)[: len(blocks)]
    assert torch.equal(made.round(blocks, flat, zeros).view_as(weight), unblocked)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_legal_scales_are_exact_and_never_zero(precision: str) -> None:
    made = grid(bits=4, group_size=16, scale_dtype=precision)
    scale = made.legal(torch.tensor([[0.0, 1e-30, 0.1234567, -3.0]]))
    assert (scale > 0).tolist() == [[True, True, True, False]]
    assert bool((scale.abs() > 1e-8).all())
    assert torch.equal(scale, scale.to(getattr(torch, precision)).float())
    assert bool((1 / scale.to(getattr(torch, precision))).isfinite().all())


def test_kernels_of_integer_activations_take_no_dead_channel() -> None:
    made = grid(narrow=True, bits=8, activation="int8-static")
    assert made.integers == (-127, 127)
    assert float(made.legal(torch.tensor([[1e-9], [1.0]])).min()) == 2.0**-12


def test_the_widest_scale_clips_nothing() -> None:
    for scheme in ({"bits": 4, "group_size": 16}, {"bits": 4, "group_size": 16, "symmetric": False}):
        made, weight = grid(**scheme), weights().abs()
        blocks = made.blocks(weight)
        low, high = Scheme(**scheme).range
        assert bool((blocks.amax(1, keepdim=True) / made.widest(blocks) <= high - low + 1e-3).all())
