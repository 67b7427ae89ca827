"""Shapes, the parameter counts that the papers state, and mistakes in a network's arguments."""

from __future__ import annotations

import pytest
import torch

from qaware.errors import QawareError
from qaware.vision.networks import ResidualBlock, build_network


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_resnets_have_the_size_of_the_paper(depth: int, millions: float) -> None:
    network = build_network({"name": "cifar-resnet", "depth": depth})
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.006)
    assert sum(p.dim() > 1 for p in network.parameters()) == depth


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (9, 13)])
def test_any_size_gives_logits(size: tuple[int, int]) -> None:
    for name in ("small-cnn", "cifar-resnet"):
        network = build_network({"name": name, "classes": 7, "channels": 1})
        assert network(torch.zeros(2, 1, *size)).shape == (2, 7)


def test_a_shortcut_subsamples_and_pads_with_zero_channels() -> None:
    block = ResidualBlock(2, 6, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 2, 5, 5)
    y = block(x)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 4:].any()


def test_state_dict_keys_are_those_of_published_checkpoints() -> None:
    keys = build_network("cifar-resnet").state_dict().keys()
    assert {"conv1.weight", "layer1.0.bn2.running_var", "layer3.2.conv1.weight", "linear.bias"} <= keys
    assert not any("shortcut" in key for key in keys)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet", "network.name: 'resnet' is not one of cifar-resnet, small-cnn"),
        ({"depth": 20}, "network.name: None"),
        ({"name": "cifar-resnet", "depth": 21}, "depth: 21 is not 6 n \\+ 2"),
        ({"name": "cifar-resnet", "width": 3}, "width"),
        ({"name": "small-cnn", "classes": "many"}, "classes"),
    ],
)
def test_refuses(spec: object, message: str) -> None:
    with pytest.raises(QawareError, match=message):
        build_network(spec)  # type: ignore[arg-type]


def test_a_block_cannot_lose_channels() -> None:
    with pytest.raises(QawareError, match="width: 5 must be 2 and an even number more"):
        ResidualBlock(2, 5)
