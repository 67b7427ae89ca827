"""The table in every logger of the Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from qaware.report.ledger import Row
from qaware.report.table import cells, markdown

NAME = "qaware"
_SCALARS = (
    *("nats", "perplexity", "bits_per_byte", "accuracy", "kl", "top1", "sqnr"),
    *("d_nats", "d_accuracy", "recovered", "bytes"),
)


def log_rows(trainer: pl.Trainer, rows: Sequence[Row]) -> None:
    """Write every figure as a metric, and the table in the form that each logger has for one.

    ``LightningModule.log`` is not allowed once training has ended, so the loggers are called directly.
    """
    if not trainer.is_global_zero:
        return
    figures = _figures(rows)
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)
        _log_table(logger, rows, trainer.global_step)
        logger.save()


def _figures(rows: Sequence[Row]) -> dict[str, float]:
    """``qaware/<model>/<stage>/<figure>``."""
    return {
        f"{NAME}/{row['model']}/{row['stage']}/{key}".replace(" ", "_"): float(row[key])
        for row in rows
        for key in _SCALARS
        if isinstance(row.get(key), (int, float))
    }


def _log_table(logger: Logger, rows: Sequence[Row], step: int) -> None:
    """CSV and other loggers have no table; there the metrics are it."""
    headings, body = cells(rows)
    if isinstance(logger, WandbLogger):
        logger.log_table(NAME, columns=headings, data=body, step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(NAME, markdown(rows), step)
    elif isinstance(logger, MLFlowLogger):
        assert logger.run_id is not None
        logger.experiment.log_text(logger.run_id, markdown(rows), f"{NAME}.md")
