"""The table reaches every kind of logger."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lit import LitLM, loader, trainer

from qaware import PostTrainingQuantization

KEY = "qaware/int8-dynamic_ptq/converted/nats"


def run(loggers: object, folder: Path) -> PostTrainingQuantization:
    ptq = PostTrainingQuantization("int8-dynamic", output_dir=folder / "out")
    trainer(callbacks=[ptq], logger=loggers, max_epochs=1).fit(LitLM(), loader(), loader(9))
    return ptq


def test_csv(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    run(logger, tmp_path)
    assert KEY in (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    ptq = run([logger, CSVLogger(tmp_path, name="both", version="")], tmp_path)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert ptq.result is not None
    assert abs(events.Scalars(KEY)[0].value - ptq.result.scores["converted"].nats) < 1e-5
    table = events.Tensors("qaware/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| int8-dynamic ptq | converted |" in table


def test_wandb_and_mlflow_get_a_table() -> None:
    from qaware.callbacks.loggers import log_rows

    # Neither package is a dependency; the calls are those that their loggers document.
    wandb, mlflow = MagicMock(spec=WandbLogger), MagicMock(spec=MLFlowLogger)
    mlflow.run_id, mlflow.experiment = "1", MagicMock()
    owner = MagicMock(is_global_zero=True, global_step=7, loggers=[wandb, mlflow])
    log_rows(owner, [{"model": "a", "stage": "float", "bytes": 4, "nats": 1.5}])
    wandb.log_metrics.assert_called_once_with(
        {"qaware/a/float/nats": 1.5, "qaware/a/float/bytes": 4.0}, step=7
    )
    wandb.log_table.assert_called_once_with(
        "qaware", columns=["model", "stage", "nats", "size"], data=[["a", "float", "1.5000", "4 B"]], step=7
    )
    name = mlflow.experiment.log_text.call_args.args
    assert name[0] == "1"
    assert name[2] == "qaware.md"


def test_no_logger(tmp_path: Path) -> None:
    run(False, tmp_path)
    assert (tmp_path / "out" / "report.md").exists()
