"""The table reaches every logger, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from qaware import PostTrainingQuantization, QuantizationAwareTraining
from qaware.report.ledger import read_rows

from .data import images, sequences
from .models import Classifier
from .runs import STATIC, make, trainer

STAGES = {"qat": ["float", "prepared", "converted"], "ptq": ["float", "converted"]}
METHODS = {"qat": QuantizationAwareTraining, "ptq": PostTrainingQuantization}


def figures(folder: Path) -> dict[str, float]:
    """The last value of each column of a ``metrics.csv``."""
    head, *rows = (line.split(",") for line in (folder / "metrics.csv").read_text().splitlines())
    return {name: float(row[i]) for row in rows for i, name in enumerate(head) if row[i]}


def tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.mark.parametrize("kinds", [("csv",), ("tb",), ("csv", "tb"), ()], ids="-".join)
@pytest.mark.parametrize("method", ["qat", "ptq"])
def test_case_43_every_logger_has_the_table(method: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Measured: ``self.log`` is forbidden once training has ended, and a report was in no logger. CSV,
    TensorBoard, both and none get every stage's figures; the files are there in any case."""
    make_logger = {"csv": CSVLogger, "tb": TensorBoardLogger}
    loggers = [make_logger[kind](tmp_path, name=kind, version="") for kind in kinds]
    callback = METHODS[method](STATIC, output_dir=tmp_path / "out")
    trainer(callback, logger=loggers or False, max_epochs=1, log_every_n_steps=1).fit(
        make(), sequences(), sequences(9)
    )
    rows = {(row["model"], row["stage"]): row for row in read_rows(tmp_path / "out" / "results.jsonl")}
    assert [stage for _, stage in rows] == STAGES[method]
    assert (tmp_path / "out" / "report.md").exists()
    for (model, stage), row in rows.items():
        key = f"qaware/{model}/{stage}/nats".replace(" ", "_")
        if "csv" in kinds:
            assert figures(tmp_path / "csv")[key] == pytest.approx(row["nats"], rel=1e-6)
        if "tb" in kinds:
            assert tensorboard(tmp_path / "tb").Scalars(key)[-1].value == pytest.approx(row["nats"], rel=1e-6)
    if "tb" in kinds:
        text = tensorboard(tmp_path / "tb").Tensors("qaware/text_summary")[0].tensor_proto.string_val[0]
        assert f"| {STATIC} {method} | {STAGES[method][1]} |" in text.decode()


def test_case_43_a_classifier_reports_accuracy(tmp_path: Path) -> None:
    """Beside language models: labelled classes are scored by accuracy, in the same table."""
    callback = QuantizationAwareTraining(STATIC, target="net", output_dir=tmp_path / "out")
    logger = CSVLogger(tmp_path, name="csv", version="")
    trainer(callback, logger=logger, log_every_n_steps=1).fit(make(Classifier), images(), images(1))
    found = figures(tmp_path / "csv")
    assert found[f"qaware/{STATIC}_qat/converted/accuracy"] > 0.9
    assert found["qaware/float/float/accuracy"] < 0.9


def test_without_validation_data_the_model_is_converted_unscored(tmp_path: Path) -> None:
    """No ``val_dataloader``: nothing to score, and still a result and its row."""
    callback = QuantizationAwareTraining(STATIC, output_dir=tmp_path / "out")
    trainer(callback).fit(make(), sequences())
    assert callback.result is not None
    assert callback.result.scores == {}
    assert [row["stage"] for row in read_rows(tmp_path / "out" / "results.jsonl")] == STAGES["qat"][1:]
