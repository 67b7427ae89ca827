"""The fake-quantized embedding, which rounds the rows that are looked up and not the table."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchao.quantization.qat import FakeQuantizedEmbedding


class LookedUpEmbedding(FakeQuantizedEmbedding):  # type: ignore[misc]
    """torchao's, with the same values and gradients. A table has many more rows than a batch of text has
    tokens, and each row has scales of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """int64 (...) to (..., embedding_dim), dtype of the weight."""
        # Looking up with max_norm writes to what is looked up in: a rounded copy.
        apart = self.weight_fake_quantizer.by_row and self.max_norm is None
        if not apart or not 0 < x.numel() < len(self.weight):
            return super().forward(x)  # type: ignore[no-any-return]
        rows = F.embedding(
            x.flatten(),
            self.weight,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        rounded: Tensor = self.weight_fake_quantizer.of_rows(rows, x.flatten())
        return rounded.view(*x.shape, self.embedding_dim)
