"""The networks that come with the package, by name: a ResNet for CIFAR and a small one for digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.config import arguments_of
from qaware.errors import QawareError


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the input is carried, as it is or, where the shape changes,
    subsampled and with channels of zeros around it: a shortcut without parameters (option A of He et al.
    2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 3.3)."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        """``channels`` come in and ``width`` go out, at 1/``stride`` of the height and width.

        Raises:
            QawareError: the channels to add cannot be divided between both sides.
        """
        super().__init__()
        if width < channels or (width - channels) % 2:
            raise QawareError(f"width: {width} must be {channels} and an even number more")
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, width, H / stride, W / stride), rounded up."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding)) if self.padding else x


class CifarResNet(nn.Module):
    """The ResNet for 32x32 images of He et al. 2016, section 4.2: 16, 32 and 64 channels, a third of the
    blocks each. ResNet20 has 0.27 million parameters. Any size of image works.

    Args:
        depth: layers with weights, 6 n + 2: 20, 32, 44, 56, 110.
        classes: number of classes.
        channels: of the images.

    Raises:
        QawareError: no such depth.
    """

    def __init__(self, depth: int = 20, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise QawareError(f"depth: {depth} is not 6 n + 2; use 20, 32, 44, 56 or 110")
        self.classes, self.channels = classes, channels
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float (B, classes), for float images (B, channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        logits: Tensor = self.linear(torch.flatten(x, 1))
        return logits


class SmallCNN(nn.Module):
    """For 8x8 to 28x28 images: a convolution, a residual block, pooling, a wider convolution, a linear layer.

    Args:
        classes: number of classes.
        channels: of the images.
        width: channels of the first layers; the last convolution has twice as many.
    """

    def __init__(self, classes: int = 10, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.classes, self.channels = classes, channels
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.block = ResidualBlock(width, width)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float (B, classes), for float images (B, channels, H, W), 2x2 pixels or more."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.pool(self.block(x))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        logits: Tensor = self.linear(torch.flatten(x, 1))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {"cifar-resnet": CifarResNet, "small-cnn": SmallCNN}


def build_network(spec: str | Mapping[str, Any]) -> nn.Module:
    """A network with random weights from its name, or ``{"name": ..., <its arguments>}``.

    Raises:
        QawareError: no such network, or an argument that it does not have.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", None)
    if name not in NETWORKS:
        raise QawareError(f"network.name: {name!r} is not one of {', '.join(NETWORKS)}")
    network: nn.Module = NETWORKS[name](**arguments_of(NETWORKS[name], "network", given))
    return network


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(channels, width, stride)
    return nn.Sequential(first, *(ResidualBlock(width, width) for _ in range(blocks - 1)))


def _initialize(network: nn.Module) -> None:
    """He et al. 2015, "Delving Deep into Rectifiers", arXiv:1502.01852, section 2.2."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
