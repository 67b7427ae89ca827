"""The two models whose speed is measured, with random weights from a seed: speed depends on shapes only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.inputs import Size, images
from qaware.lm import CausalLM

SEED = 0


def language_model(size: Size) -> CausalLM:
    """A Llama with grouped attention heads and a head of its own, in evaluation mode."""
    torch.manual_seed(SEED)
    model = CausalLM(
        {
            "model_type": "llama",
            "hidden_size": size.hidden,
            "intermediate_size": size.feedforward,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "vocab_size": size.vocabulary,
            "max_position_embeddings": size.context,
            "tie_word_embeddings": False,
        }
    )
    return model.eval().requires_grad_(False)


class Convolutions(nn.Module):
    """3x3 convolutions with batch norm and ReLU, the mean over the image, a linear layer of 10 classes."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        entering = 3
        for width in channels:
            stride = 2 if width > entering > 3 else 1
            layers += [nn.Conv2d(entering, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            entering = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(entering, 10)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, 3, H, W) to (B, 10)."""
        y: Tensor = self.head(self.features(x).mean((2, 3)))
        return y


def convolutions(size: Size) -> Convolutions:
    """The network after its batch norms have seen a few batches, in evaluation mode."""
    torch.manual_seed(SEED)
    model = Convolutions(size.channels)
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(8, 3, size.image, size.image))
    return model.eval().requires_grad_(False)


def calibration(size: Size) -> list[Tensor]:
    """16 images in batches of one, float32 (1, 3, H, W)."""
    return list(torch.from_numpy(images(16, size.image)).split(1))
