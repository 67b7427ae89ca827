"""Block by block gives the integers of a run from the input for each group of layers, and runs less."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from recorded import recorded
from rounded import recipe
from torch import Tensor, nn

import qaware
from qaware.engines.base import QuantizedModel
from qaware.rounding import apply, walk
from qaware.rounding.beside import Beside
from qaware.rounding.moments import Moments
from qaware.rounding.skipping import chains

WIDTH = 16


class Block(nn.Module):
    """Residual; counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.runs: list[int] = []

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor]:
        self.runs.append(1)
        return (x + self.down(torch.relu(self.up(x) + shift)),)


class Stack(nn.Module):
    """Blocks that give tuples and take what comes from before the first of them, with a norm between."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x, shift = self.stem(x), x.mean()
        for block in self.blocks:
            (x,) = block(self.norm(x), shift)
        return self.head(x)


class Dense(Stack):
    """Each block takes what all before it gave."""

    def forward(self, x: Tensor) -> Tensor:
        x, shift = self.stem(x), x.mean()
        found = [x]
        for block in self.blocks:
            found.append(block(torch.stack(found).sum(0), shift)[0])
        return self.head(torch.stack(found).sum(0))


class Twice(Stack):
    """Goes through its blocks again."""

    def forward(self, x: Tensor) -> Tensor:
        x, shift = self.stem(x), x.mean()
        for block in (*self.blocks, *self.blocks):
            (x,) = block(x, shift)
        return self.head(x)


def batches() -> list[Tensor]:
    return [torch.randn(6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def made(kind: type[Stack], method: Any = "gptq", depth: int = 4) -> QuantizedModel:
    torch.manual_seed(0)
    model = kind(depth).eval()
    return qaware.quantize(model, recipe(method, {"bits": 3}), calibration=batches())


def runs(found: QuantizedModel) -> int:
    """How often the first block ran."""
    module: Any = found.module
    return len(module.blocks[0].runs)


@pytest.mark.parametrize("kind", [Stack, Dense, Twice])
@pytest.mark.parametrize(
    "method", ["gptq", {"gptq": {"correct": False}}, ["gptq", "bias-correction"]], ids=str
)
def test_the_integers_of_a_replay(kind: type[Stack], method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = made(kind, method)
    monkeypatch.setattr(walk, "find_blocks", lambda *_: [])
    replayed = made(kind, method)
    assert walked.rounding.to_dict() == replayed.rounding.to_dict()
    for name, weight in replayed.weights.items():
        assert torch.equal(weight.data, walked.weights[name].data)
        assert torch.equal(weight.scale, walked.weights[name].scale)
    with torch.no_grad():
        assert torch.equal(walked.module(batches()[0]), replayed.module(batches()[0]))


def test_a_finished_block_does_not_run_again() -> None:
    assert runs(made(Stack, depth=4)) == runs(made(Stack, depth=8))
    assert runs(made(Dense, depth=4)) < runs(made(Dense, depth=8))


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Dense, "take more than what the block before gives"), (Twice, "does not run once in a call")],
)
def test_blocks_that_do_not_chain_are_said(
    kind: type[Stack], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="qaware.rounding.walk"):
        made(kind)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "qaware.rounding.walk"]
    assert line.startswith("rounding: runs the model from its input for each of 10 groups, as ")
    assert why in line


def test_what_the_float_model_needs_no_more_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, list[str]] = {}
    plain = apply.round_layer

    def watched(name: str, *args: Any) -> Any:
        (beside,) = (each for each in gc.get_objects() if type(each) is Beside)
        sums = [each for each in gc.get_objects() if type(each) is Moments]
        assert len(sums) == 1
        held[name] = list(beside._kept)
        return plain(name, *args)

    monkeypatch.setattr(apply, "round_layer", watched)
    made(Stack, depth=2)
    # What a block gives in float is known when its last layer is rounded.
    assert held["blocks.0.up"] == ["stem", "blocks.0.up"]
    assert held["blocks.0.down"] == held["blocks.1.down"] == ["stem"]


def test_blocks_that_chain_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qaware.rounding.walk"):
        made(Stack)
    assert not [r for r in caplog.records if r.name == "qaware.rounding.walk"]


def test_nothing_is_left_on_the_model() -> None:
    found = made(Stack)
    assert all("forward" not in vars(module) for module in found.module.modules())


def test_chains() -> None:
    for kind, expected in ((Stack, True), (Dense, False)):
        model = kind().eval()
        (call, *_) = recorded(model, batches())
        assert chains(model, call, [f"blocks.{i}" for i in range(4)]) is expected
        assert all("forward" not in vars(module) for module in model.modules())
