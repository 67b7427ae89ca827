"""Steps that hand keys and values in and take them back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qaware.errors import QawareError
from qaware.exporters.growing import GrowingRunner


def echo(arrays: list[Any]) -> list[Any]:
    """Logits: the ids seen so far, summed; keys: the ids."""
    ids, past = arrays
    new = ids.astype(np.float32)[:, None, :, None]
    present = np.concatenate([past, new], 2)
    sums = present[0, 0, :, 0].cumsum()[-ids.shape[1] :]
    return [sums.astype(np.float32)[None, :, None], present]


def test_later_tokens_see_earlier_ones_and_a_step_back_forgets() -> None:
    step = GrowingRunner("a.onnx", echo, [(1, 1)])
    assert step(torch.tensor([[1, 2, 3]]), 0).flatten().tolist() == [1, 3, 6]
    assert step(torch.tensor([[10]]), 3).flatten().tolist() == [16]
    assert step(torch.tensor([[10, 1]]), 1).flatten().tolist() == [11, 12]
    with pytest.raises(QawareError, match=r"a\.onnx: step at 9, but only 3 tokens were given"):
        step(torch.tensor([[1]]), 9)
    assert step(torch.tensor([[5]]), 0).flatten().tolist() == [5]
