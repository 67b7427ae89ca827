"""Round to nearest is what the fake-quantizers do by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounded import SCHEMES, grid, name_of, weights

from qaware.rounding import rtn
from qaware.roundings import Rtn


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "scale_dtype" not in s], ids=name_of)
def test_as_the_fake_quantizer(scheme: dict[str, Any]) -> None:
    made, weight = grid(**scheme), weights()
    assert torch.equal(rtn.choose(weight, made, Rtn(), None).weight, made.quantizer(weight))
