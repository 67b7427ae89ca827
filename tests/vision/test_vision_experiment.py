"""Experiments on images from the command line: run, check, report, evaluate; and real data where it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qaware.cli import main
from qaware.report.ledger import read_rows
from qaware.vision import ImageClassifier, ImageDataModule

RECIPE = "int8-static"


def settings(folder: Path, images: Path) -> dict[str, Any]:
    network = {"name": "small-cnn", "classes": 3, "channels": 1, "width": 4}
    model = {"network": network, "lr": 0.05}
    data = {"source": str(images), "val_fraction": 0.5, "batch_size": 6, "crop_padding": 1, "flip": True}
    return {
        "name": "tiny",
        "output": str(folder / "runs"),
        "model": {"class_path": "qaware.vision.ImageClassifier", "init_args": model},
        "data": {"class_path": "qaware.vision.ImageDataModule", "init_args": data},
        "trainer": {"max_epochs": 8, "accelerator": "cpu", "enable_progress_bar": False},
        "finetune": {"max_steps": 6, "lr": 0.01},
        "quantize": [{"recipe": RECIPE, "methods": ["ptq", "qat"], "freeze_batch_norm_step": 4}],
    }


def written(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def only_run(folder: Path) -> Path:
    return next((folder / "runs" / "tiny").iterdir())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Lightning's logger lets through; it hands nothing on to the root logger."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_run_and_report(
    tmp_path: Path, jpeg_npz: Path, capsys: pytest.CaptureFixture[str], said: pytest.LogCaptureFixture
) -> None:
    assert main(["run", written(tmp_path, settings(tmp_path, jpeg_npz))]) == 0
    rows = {(row["model"], row["stage"]): row for row in read_rows(only_run(tmp_path) / "results.jsonl")}
    assert list(rows) == [
        ("float", "float"),
        ("float control", "float"),
        (f"{RECIPE} ptq", "converted"),
        (f"{RECIPE} qat", "prepared"),
        (f"{RECIPE} qat", "converted"),
    ]
    assert len({row["fingerprint"] for row in rows.values()}) == 1
    for (model, stage), row in rows.items():
        assert row["perplexity"] is None
        assert row["count"] == 12
        if not model.startswith("float"):
            assert row["d_accuracy"] == row["accuracy"] - rows["float control", "float"]["accuracy"]
            assert row["sqnr"] > 5, stage
            assert row["bytes"] > 0
    shown = capsys.readouterr().out
    assert "qaware: engine eager" in said.text
    assert "GPU available" not in said.text
    assert "ppl" not in shown
    report = (only_run(tmp_path) / "report.md").read_text()
    assert "| d-acc |" in report
    assert main(["report", str(tmp_path / "runs" / "tiny")]) == 0
    assert "SQNR" in capsys.readouterr().out
    assert (only_run(tmp_path) / "report.md").read_text() == report


def test_check_and_mistakes(tmp_path: Path, jpeg_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, jpeg_npz)
    path = written(tmp_path, config)
    assert main(["check", path]) == 0
    shown = capsys.readouterr().out
    assert "network.block.conv1.weight" in shown
    assert "int8 channel + int8-static" in shown
    for change, message in (
        ("data.init_args.source=missing.npz", "source: 'missing.npz' does not exist"),
        ("data.init_args.batch_size=0", "batch_size: 0 must be at least 1"),
        ("model.init_args.network.name=resnet", "network.name: 'resnet' is not one of"),
        ("model.init_args.network.classes=2", "classes: the images have 3 and the network 2"),
        ("quantize=[{recipe: int8-static, engine: eagre}]", "engine: 'eagre' is not one of"),
        ("quantize=[{recipe: int8-static, freeze_batch_norm: 3}]", "freeze_batch_norm"),
    ):
        assert main(["run", path, change]) == 2, change
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("qaware: error: ")
        assert message in error


def test_an_artifact_is_evaluated_later(
    tmp_path: Path, jpeg_npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tract")
    config = settings(tmp_path, jpeg_npz)
    config["quantize"] = [{"recipe": "int8-weight-only", "export": ["tract"]}]
    assert main(["run", written(tmp_path, config)]) == 0
    artifact = next((only_run(tmp_path) / "artifacts").glob("*.nnef.tgz"))
    metadata = json.loads(artifact.with_name(artifact.name + ".json").read_text())["metadata"]
    assert metadata["preprocessing"]["size"] == [6, 6]
    capsys.readouterr()
    assert main(["evaluate", str(artifact), "--data", str(jpeg_npz), "--max-windows", "10"]) == 0
    shown = capsys.readouterr().out
    assert "tract" in shown
    assert "accuracy" in shown
    assert main(["evaluate", str(artifact), "--data", str(jpeg_npz), "--window", "3"]) == 2
    assert "window: 3 is for text" in capsys.readouterr().err
    assert main(["evaluate", str(artifact), "--data", "missing.npz"]) == 2
    assert "'missing.npz' does not exist" in capsys.readouterr().err


def test_the_published_resnet20(shared_data: Path) -> None:
    """On a tenth of the JPEG copy; all 10,000 give 86.1%, and the normalization is the author's."""
    folder = shared_data / "vision"
    model = ImageClassifier("cifar-resnet", checkpoint=str(folder / "resnet20-12fca82f.th")).eval()
    data = ImageDataModule(
        str(folder / "cifar10_jpg_train10k.npz"),
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        val_fraction=0.1,
        batch_size=200,
    )
    with torch.no_grad():
        right = [(model(images).argmax(-1) == labels) for images, labels in data.val_dataloader()]
    assert torch.cat(right).float().mean() == pytest.approx(0.86, abs=0.03)


def test_real_mnist(shared_data: Path) -> None:
    data = ImageDataModule(str(shared_data / "vision" / "mnist_test_train20k.npz"))
    assert (len(data.train_dataloader().dataset), len(data.val_dataloader().dataset)) == (20_000, 10_000)  # type: ignore[arg-type]
    assert (data.channels, data.classes) == (1, 10)
    assert data.preprocessing()["mean"] == pytest.approx([0.1307], abs=2e-3)
