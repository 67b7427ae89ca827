"""The first layer that a runtime computes otherwise: found in few exports, on runtimes of both kinds."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qaware
from qaware.bisect_layers import Search, first_difference, run_order
from qaware.engines.base import QuantizedModel
from qaware.errors import ParityError, QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Exporter, Runner, Tolerance
from qaware.exporters.signature import Signature
from qaware.exporters.tract import TractExporter
from qaware.pipeline import Pipeline, QuantizationResult
from qaware.plan import Decision
from qaware.report.ledger import Ledger
from qaware.tasks import UnscoredTask, batch_signature


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for layer in self.inner:
            x = x + layer(x)
        return self.head(x.mean((2, 3)))


class Broken(Exporter):
    """torch itself, which adds ``amount`` steps to what the layer ``wrong`` returns; takes no graph in which
    that layer is not run when ``strict``."""

    name = "broken"
    suffix = ".broken"
    tolerance: ClassVar[Tolerance] = Tolerance(1e-6, 1e-9, "the same code runs", steps=1)

    def __init__(self, wrong: str, amount: float = 3, strict: bool = False) -> None:
        self.wrong, self.amount, self.strict = wrong, amount, strict
        self.exports: list[Path] = []

    def refuse(self, decision: Decision) -> str | None:
        return None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> None:
        self.exports.append(path)
        wrapped = signature.wrap(quantized.module)
        if self.strict and not getattr(wrapped, "stop", True):
            raise QawareError("a weight is not in the graph")
        if self.wrong in dict(quantized.module.named_modules()):
            module: Any = quantized.module.get_submodule(self.wrong)
            step = quantized.outputs[self.wrong].scale if self.wrong in quantized.outputs else 0.01
            module.register_forward_hook(_Add(self.amount * step))
        torch.save(wrapped, path)

    def open(self, path: Path, signature: Signature) -> Runner:
        module = torch.load(path, weights_only=False)

        def run(*tensors: Tensor) -> Tensor:
            with torch.no_grad():
                return module(*tensors).float()

        return run


class _Add:
    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.amount


def image(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    return qaware.quantize(Residual().eval(), "int8-static", [image(), image(1)])


SIGNATURE = batch_signature([image()], [None], 4)


def search(quantized: QuantizedModel, exporter: Exporter, folder: Path) -> Search:
    @contextlib.contextmanager
    def open_runner(artifact: Artifact) -> Iterator[Runner]:
        yield exporter.open(artifact.path, artifact.signature)

    return Search(exporter, quantized, (image(),), SIGNATURE, [(image(2),)], open_runner, folder)


def test_layers_and_functions_in_the_order_in_which_they_run(quantized: QuantizedModel) -> None:
    names = run_order(quantized, SIGNATURE, (image(),))
    pairs = [(f"inner.{i}", f"qaware_operations.add_{i}") for i in range(4)]
    assert names == ["first", *(name for pair in pairs for name in pair), "head"]
    assert not any(m._forward_hooks for m in quantized.module.modules())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("wrong", ["first", "inner.2", "qaware_operations.add_1", "head"])
def test_the_wrong_one_is_found(quantized: QuantizedModel, wrong: str, strict: bool, tmp_path: Path) -> None:
    exporter = Broken(wrong, strict=strict)
    before = copy.deepcopy(quantized.module.state_dict())
    assert first_difference(search(quantized, exporter, tmp_path), 60) == (
        f"first layer that differs: {wrong} (3 steps)"
    )
    assert len(exporter.exports) <= 4 * (1 + strict)
    assert list(tmp_path.iterdir()) == []
    assert not any(m._forward_hooks for m in quantized.module.modules())
    assert all(torch.equal(value, before[key]) for key, value in quantized.module.state_dict().items())


def test_without_grids_the_difference_is_relative(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    found = search(qaware.quantize(model, "int8-weight-only"), Broken("2"), tmp_path)
    found.example, found.inputs = (torch.randn(4, 8),), [(torch.randn(4, 8),)]
    found.signature = batch_signature(found.example, [None], 4)
    said = first_difference(found, 60)
    assert said is not None
    assert said.startswith("first layer that differs: 2 (relative difference ")


def test_nothing_is_named_where_every_layer_is_right(quantized: QuantizedModel, tmp_path: Path) -> None:
    exporter = Broken("nowhere")
    assert first_difference(search(quantized, exporter, tmp_path), 60) is None
    assert len(exporter.exports) == 3  # of 10 sites


def test_time_is_limited(quantized: QuantizedModel, tmp_path: Path) -> None:
    exporter = Broken("first")
    assert first_difference(search(quantized, exporter, tmp_path), 0) is None
    assert exporter.exports == []


def test_a_runtime_that_refuses_half_a_model_is_no_second_error(
    quantized: QuantizedModel, tmp_path: Path
) -> None:
    class Refuses(Broken):
        def write(self, *args: Any) -> None:
            raise ZeroDivisionError

    assert first_difference(search(quantized, Refuses("first"), tmp_path), 60) is None


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_the_parity_error_names_it(
    quantized: QuantizedModel, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = Broken("inner.1")

    @contextlib.contextmanager
    def open_runner(artifact: Artifact) -> Iterator[Runner]:
        runner: Any = exporter.open(artifact.path, artifact.signature)
        runner.length = 0
        yield runner

    monkeypatch.setattr("qaware.pipeline.IsolatedRunner", open_runner)
    monkeypatch.setattr("qaware.measuring.IsolatedRunner", open_runner)
    task = UnscoredTask([(image(),)], SIGNATURE)
    pipeline = Pipeline(Ledger(), task, [exporter], tmp_path, "m", search_seconds=seconds)
    result = QuantizationResult(quantized, quantized.plan)
    pipeline.export_all(result)
    error = result.failures["broken"]
    assert isinstance(error, ParityError)
    named = "first layer that differs: inner.1 (3 steps)" in str(error)
    assert named is (seconds > 0)
    assert "\n" not in str(error)


@pytest.mark.skipif(importlib.util.find_spec("tract") is None, reason="tract is not installed")
def test_on_tract(tmp_path: Path) -> None:
    class Wrong(TractExporter):
        def write(self, quantized: QuantizedModel, *args: Any) -> None:
            if "inner.1" in quantized.weights:
                quantized.weights["inner.1"].data[0, :4] = 7
            super().write(quantized, *args)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.inner:
                x = torch.tanh(layer(x))
            return x

    torch.manual_seed(0)
    found = search(qaware.quantize(Net().eval(), "int8-weight-only"), Wrong(), tmp_path)
    found.example, found.inputs = (torch.randn(4, 32),), [(torch.randn(4, 32),)]
    found.signature = batch_signature(found.example, [None], 4)
    said = first_difference(found, 120)
    assert said is not None
    assert said.startswith("first layer that differs: inner.1 (relative difference ")
