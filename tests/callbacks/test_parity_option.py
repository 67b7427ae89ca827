"""``parity`` of the callbacks and of an experiment: what passes, what fails, and what is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fake_runtime import FakeExporter
from lit import LitLM, loader, trainer

import qaware.exporters
from qaware import ParityError, PostTrainingQuantization, QawareError, QuantizationAwareTraining
from qaware.engines.base import QuantizedModel
from qaware.experiment import Experiment, Quantize
from qaware.exporters.artifact import Artifact
from qaware.exporters.signature import Signature
from qaware.report.ledger import read_rows


class Shifted(FakeExporter):
    """A hundredth off, everywhere."""

    name, suffix = "shifted", ".shifted"

    def write(self, quantized: QuantizedModel, example: Any, signature: Signature, path: Path) -> None:
        quantized.module.up.bias.data.add_(0.001)
        super().write(quantized, example, signature, path)


@pytest.fixture(autouse=True)
def shifted(fake_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(qaware.exporters.BUILTIN, "shifted", f"{__name__}:Shifted")


def quantize(folder: Path, export: str, **options: Any) -> PostTrainingQuantization:
    ptq = PostTrainingQuantization(
        "int8-weight-only", target="body", export=[export], output_dir=folder, **options
    )
    trainer(callbacks=[ptq]).validate(LitLM(), loader(9), verbose=False)
    return ptq


def test_a_looser_level_passes_with_a_warning_and_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ParityError, match="relative difference"):
        quantize(tmp_path / "own", "shifted")
    with caplog.at_level(logging.WARNING):
        ptq = quantize(tmp_path / "very", "shifted", parity="very")
    assert ptq.result is not None
    assert "shifted: parity: very is looser than this runtime's own tolerance" in caplog.text
    artifact = Artifact.open(ptq.result.artifacts["shifted"].path)
    assert "parity: very is looser" in artifact.notes[-1]
    assert artifact.parity is not None
    assert artifact.parity["level"] == "very"
    assert artifact.parity["beyond"] == 0
    assert "is looser" in read_rows(tmp_path / "very" / "results.jsonl")[-1]["notes"][-1]
    assert "is looser" in (tmp_path / "very" / "report.md").read_text()


def test_a_stricter_level_fails_what_the_runtime_would_let_pass(tmp_path: Path) -> None:
    ptq = quantize(tmp_path / "same", "fake", parity="exact")
    assert ptq.result is not None
    assert ptq.result.artifacts["fake"].notes == ("runs in torch",)
    with pytest.raises(ParityError, match="allowed by parity: close"):
        quantize(tmp_path / "other", "shifted", parity="close")


def test_every_door_refuses_an_unknown_level() -> None:
    for callback in (PostTrainingQuantization, QuantizationAwareTraining):
        assert callback("float16", parity="super").parity == "super"
        with pytest.raises(QawareError, match=r"^parity: 'loose' is not one of default, exact"):
            callback("float16", parity="loose")
    with pytest.raises(QawareError, match=r"^quantize\[0\]: parity: 'loose'"):
        Experiment("x", {}, {}, [Quantize("float16", parity="loose")])
