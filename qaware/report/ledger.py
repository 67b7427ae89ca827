"""The rows of a run: one JSON object a stage, on disk as soon as it is measured."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaware.errors import QawareError
from qaware.metrics.score import Score, paired, paired_accuracy

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Which models of the same ledger a row is measured against."""

    base: str
    """The float model that ``d_nats`` is counted from: the one with the same training steps."""
    ptq: str | None = None
    """The model whose loss ``recovered`` is a share of: plain PTQ of that float model."""


class Ledger:
    """Rows in memory and, one line each, in ``results.jsonl``; a killed run loses none that was written."""

    def __init__(self, path: Path | None = None) -> None:
        """A new ledger; a file that an earlier run left at ``path`` is kept under another name."""
        self.path = path
        if path is not None and path.is_file():
            names = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
        self.rows: list[Row] = []
        self.scores: dict[tuple[str, str], Score] = {}

    def add(
        self,
        model: str,
        stage: str,
        score: Score | None,
        size: int,
        comparison: Comparison | None = None,
        **facts: Any,
    ) -> Row:
        """Append a row.

        Args:
            model: its name in the table, e.g. ``int8-dynamic-int4-weight qat``.
            stage: ``float``, ``prepared``, ``converted`` or the name of a runtime.
            score: what was measured; None when only parity was.
            size: bytes of the model in this stage.
            comparison: adds ``d_nats`` and, of a classifier, ``d_accuracy``, their intervals, ``recovered``.
            facts: further plain values.
        """
        row: Row = {"model": model, "stage": stage, "bytes": size}
        if score is not None:
            row.update(score.row())
            self.scores[model, stage] = score
            if comparison is not None:
                row.update(self._compare(score, stage, comparison))
        row.update({k: v for k, v in facts.items() if v is not None})
        self.rows.append(row)
        self._append(row)
        return row

    def _compare(self, score: Score, stage: str, comparison: Comparison) -> Row:
        base = self.scores.get((comparison.base, "float"))
        if base is None or base.nats is None or score.nats is None:
            return {}
        difference, half_width = paired(score, base)
        row: Row = {"base": comparison.base, "d_nats": difference, "d_nats_ci95": _finite(half_width)}
        if score.hits and base.hits:
            row["d_accuracy"], row["d_accuracy_ci95"] = paired_accuracy(score, base)
        ptq = self._ptq(stage, comparison)
        if ptq is not None:
            loss, uncertainty = paired(ptq, base)
            row["ptq_loss_nats"] = loss
            # A share of a loss that could be noise is no number; the table leaves it out.
            if loss > uncertainty:
                row["recovered"] = (loss - difference) / loss
        return row

    def _ptq(self, stage: str, comparison: Comparison) -> Score | None:
        """PTQ's score in the same stage, else in the converted one."""
        if comparison.ptq is None:
            return None
        return self.scores.get((comparison.ptq, stage)) or self.scores.get((comparison.ptq, "converted"))

    def _append(self, row: Row) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise QawareError(
                f"{self.path}: cannot be written ({error.strerror}); free or choose another folder"
            ) from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``results.jsonl``; a last line that a killed run left unfinished is dropped.

    Raises:
        QawareError: no such file, no rows, or a broken line before the last.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QawareError(
            f"{path}: cannot be read ({error}); give a run folder that has a results.jsonl"
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise QawareError(f"{path}:{number}: is not valid JSON ({error})") from error
        if (
            not isinstance(row, dict)
            or not {"model", "stage"} <= row.keys()
            or not _is_size(row.get("bytes"))
        ):
            raise QawareError(
                f"{path}:{number}: has no model, stage and bytes; is this a results.jsonl of qaware?"
            )
        rows.append(row)
    if not rows:
        raise QawareError(f"{path}: has no finished row; the run ended before its first stage")
    return rows


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
