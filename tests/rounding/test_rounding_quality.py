"""The order of the methods on a real checkpoint, by KL to the float model; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qaware

INT4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
RULES = [{"name": "*.down_proj", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": INT4}]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A language model, token ids to calibrate with, and others to score."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "lm" / "stories260K" / "hf"
    text = (shared_data / "text" / "tinystories_dev.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text[:60_000], add_special_tokens=False).input_ids)[: 40 * 256].view(40, 256)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), ids[16:], ids[:16]


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).logits.log_softmax(-1) for part in ids.split(8)])


def test_the_order_of_methods(stories: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, calibration, scored = stories
    exact = log_probabilities(model, scored)
    found = {}
    for rounding in ("rtn", "mse", "hqq", "gptq"):
        made = qaware.quantize(
            model,
            {"name": "t", "rounding": rounding, "rules": RULES},
            calibration=list(calibration.split(8)),
            step=lambda net, batch: net(batch),
        )
        rounded = log_probabilities(made.module, scored)
        found[rounding] = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    assert found["gptq"] < 0.5 * found["rtn"]
    assert found["gptq"] < found["mse"] < 0.9 * found["rtn"]
    assert found["hqq"] < found["rtn"]
