"""A runtime that is torch itself, in process: the callbacks' flow without the minutes of a compiler.

In a module of its own: every folder's ``conftest`` has the same name, so a registry cannot find it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from qaware.engines.base import QuantizedModel
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Exporter, Runner, Tolerance
from qaware.exporters.signature import Signature
from qaware.plan import Decision, Plan


class FakeExporter(Exporter):
    name = "fake"
    suffix = ".fake"
    tolerance = Tolerance(1e-6, 1e-9, "the same code runs")

    def notes(self, plan: Plan) -> tuple[str, ...]:
        return ("runs in torch",)

    def refuse(self, decision: Decision) -> str | None:
        assert decision.scheme is not None
        return "3 bits have no kernel" if decision.scheme.bits == 3 else None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> None:
        torch.save(signature.wrap(quantized.module), path)

    def open(self, path: Path, signature: Signature) -> Runner:
        module = torch.load(path, weights_only=False)

        def run(*tensors: Tensor) -> Tensor:
            with torch.no_grad():
                return module(*tensors).float()

        return run


class WrongExporter(FakeExporter):
    """Drops one scale without a word, as real runtimes have done."""

    name = "wrong"
    suffix = ".wrong"

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> None:
        module = copy.deepcopy(quantized.module)
        next(
            p for n, p in module.named_parameters() if n.endswith("up.weight") or n.endswith("0.weight")
        ).scale.mul_(2)
        torch.save(signature.wrap(module), path)


class InProcess:
    length = 0  # no key-value cache

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = Artifact.open(artifact.path)
        self.run = get_exporter(artifact.runtime).open(artifact.path, artifact.signature)

    def __call__(self, *tensors: Tensor) -> Tensor:
        self.artifact.signature.validate(tensors)
        return self.run(*tensors)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        return None
