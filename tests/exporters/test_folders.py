"""Exporters that write a folder: whole or not at all, opened as it was written, never over another one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Exporter, Runner, Tolerance, Written
from qaware.exporters.signature import Signature, TensorSpec
from qaware.files import sha256
from qaware.plan import Decision

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SIGNATURE, quantize, tokens


class Folders(Exporter):
    """Two files; the second fails when ``fails``."""

    name, suffix, tolerance = "folders", ".parts", Tolerance(1.0, 1.0, "none")
    text, fails = "1", False

    def refuse(self, decision: Decision) -> str | None:
        return None

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written | None:
        (path / "sub").mkdir(parents=True)
        (path / "one").write_text(self.text)
        if self.fails:
            raise ValueError("no second")
        (path / "sub" / "two").write_text("22")
        return None

    def open(self, path: Path, signature: Signature) -> Runner:
        return lambda *tensors: torch.zeros(1)


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return quantize("int8-weight-only")


def export(model: QuantizedModel, folder: Path, **settings: object) -> Artifact:
    exporter = Folders()
    vars(exporter).update(settings)
    return exporter.export(model, (tokens(3),), SIGNATURE, folder / "lm.parts")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inputs_in_half_precision_are_refused(model: QuantizedModel, tmp_path: Path, dtype: str) -> None:
    signature = Signature((TensorSpec("x", dtype, (3,)),))
    why = f"x: is {dtype}, and artifacts take float32 inputs; use precision: bf16-mixed"
    with pytest.raises(QawareError, match=why):
        Folders().export(
            model, (torch.zeros(3, dtype=getattr(torch, dtype)),), signature, tmp_path / "a.parts"
        )


def test_the_sidecar_describes_all_files(model: QuantizedModel, tmp_path: Path) -> None:
    artifact = export(model, tmp_path)
    assert artifact.bytes == 3
    assert artifact.sha256 == sha256(tmp_path / "lm.parts")
    assert Artifact.open(tmp_path / "lm.parts") == artifact
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lm.parts", "lm.parts.json"]


def test_an_export_replaces_what_an_export_wrote(model: QuantizedModel, tmp_path: Path) -> None:
    first = export(model, tmp_path)
    with pytest.raises(QawareError, match=r"folders: export failed: ValueError: no second"):
        export(model, tmp_path, text="2", fails=True)
    assert Artifact.open(first.path) == first
    second = export(model, tmp_path, text="2")
    assert Artifact.open(first.path) == second != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lm.parts", "lm.parts.json"]


def test_a_failure_leaves_nothing(model: QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(QawareError, match="no second"):
        export(model, tmp_path, fails=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(model: QuantizedModel, tmp_path: Path) -> None:
    (tmp_path / "lm.parts").mkdir()
    (tmp_path / "lm.parts" / "thesis").write_text("years of work")
    with pytest.raises(QawareError, match=r"lm\.parts: is a folder that no export wrote; choose another"):
        export(model, tmp_path)
    assert (tmp_path / "lm.parts" / "thesis").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["lm.parts"]
