"""The table: one row a stage, what every hop cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qaware.report.ledger import Row

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A heading and how a row's cell is written; empty when the row has no such figure."""

    heading: str
    cell: Callable[[Row], str]
    always: bool = False
    """Shown even when every cell is empty."""


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: format(row[key], form) if isinstance(row.get(key), (int, float)) else ""


def _delta(row: Row) -> str:
    if row.get("d_nats") is None:
        return ""
    width = row.get("d_nats_ci95")
    return f"{row['d_nats']:+.4f}" + (f" ±{width:.4f}" if width is not None else "")


def _points(row: Row) -> str:
    """A difference of two shares in percentage points."""
    if row.get("d_accuracy") is None:
        return ""
    width = row.get("d_accuracy_ci95")
    return f"{100 * row['d_accuracy']:+.2f}" + (f" ±{100 * width:.2f}" if width is not None else "")


def _recovered(row: Row) -> str:
    if "recovered" in row:
        return f"{row['recovered']:.0%}"
    return "n.s." if "ptq_loss_nats" in row else ""


def _steps(parity: Row) -> str:
    steps = parity.get("steps")
    return "" if steps is None else f"{steps:.0f}"


def size_text(count: float) -> str:
    """Bytes with a decimal unit, e.g. ``1.25 MB``."""
    for unit in ("B", "kB", "MB"):
        if round(count, 2) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


COLUMNS = (
    Column("model", lambda row: str(row["model"]), always=True),
    Column("stage", lambda row: str(row["stage"]) + (" FAILED" if row.get("failed") else ""), always=True),
    Column("accuracy", _number("accuracy", ".2%")),
    Column("d-acc", _points),
    Column("nats", _number("nats", ".4f")),
    Column("ppl", _number("perplexity", ".3f")),
    Column("d-nats", _delta),
    Column("recovered", _recovered),
    Column("KL", _number("kl", ".2e")),
    Column("top-1", _number("top1", ".1%")),
    Column("SQNR", _number("sqnr", ".1f")),
    Column("bits/byte", _number("bits_per_byte", ".3f")),
    Column("size", lambda row: size_text(row["bytes"]) if row["bytes"] else "", always=True),
    Column("parity", lambda row: format(row["parity"]["relative"], ".0e") if row.get("parity") else ""),
    Column("steps", lambda row: _steps(row.get("parity") or {})),
)

FOOTNOTES = {
    "d-acc": (
        "d-acc: percentage points of accuracy more than the float model named in `base`, with the half width "
        "of a paired 95% interval"
    ),
    "d-nats": (
        "d-nats: nats more than the float model named in `base`, with the half width of a paired 95% interval"
    ),
    "recovered": (
        "recovered: share of the PTQ loss (in nats, same stage) won back; "
        "n.s.: the PTQ loss is within its interval"
    ),
    "KL": "KL, top-1: divergence from, and agreement with, the same float model, for each token or image",
    "SQNR": "SQNR: signal to quantization noise of the logits in dB, against the same float model",
    "parity": (
        "parity: mean absolute difference from the converted model over the standard deviation of its output"
    ),
    "steps": "steps: the largest difference from the converted model, in quantization steps of its output",
}


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and text cells, without columns that no row fills; a repeated model name is left blank."""
    columns = [*COLUMNS, *_extra_columns(rows)]
    table = [[column.cell(row) for column in columns] for row in rows]
    keep = [i for i, c in enumerate(columns) if c.always or any(line[i] for line in table)]
    body = [[line[i] for i in keep] for line in table]
    for i in range(len(body) - 1, 0, -1):
        if body[i][0] == body[i - 1][0]:
            body[i][0] = ""
    return [columns[i].heading for i in keep], body


def _extra_columns(rows: Sequence[Row]) -> list[Column]:
    """One for each further ``evaluate`` metric that a row carries."""
    names = dict.fromkeys(name for row in rows for name in row.get("extra") or ())
    return [Column(name, partial(_extra, name=name)) for name in names]


def _extra(row: Row, name: str) -> str:
    value = (row.get("extra") or {}).get(name)
    return "" if value is None else f"{value:.4g}"


def footnotes(headings: Sequence[str]) -> list[str]:
    """What the shown columns mean."""
    return [text for heading, text in FOOTNOTES.items() if heading in headings]


def rich_table(rows: Sequence[Row], title: str = "") -> Table:
    """For a terminal."""
    from rich.markup import escape
    from rich.table import Table

    headings, body = cells(rows)
    table = Table(
        title=escape(title) or None,
        header_style="bold",
        caption="\n".join(footnotes(headings)),
        caption_justify="left",
    )
    for heading in headings:
        table.add_column(
            escape(heading), justify="left" if heading in ("model", "stage") else "right", no_wrap=True
        )
    for line, row in zip(body, rows, strict=True):
        table.add_row(*map(escape, line), style="red" if row.get("failed") else None)
    return table


def print_table(rows: Sequence[Row], title: str = "", **console: Any) -> None:
    """Print with rich, never narrower than the table: a cut number is worse than a wrapped line."""
    from rich.console import Console
    from rich.measure import Measurement

    screen = Console(**console)
    table = rich_table(rows, title)
    width = Measurement.get(screen, screen.options.update(max_width=400), table).maximum
    Console(**{**console, "width": max(width, screen.width)}).print(table)


def markdown(rows: Sequence[Row]) -> str:
    """GitHub table with its footnotes."""
    headings, body = cells(rows)
    lines = ["| " + " | ".join(headings) + " |"]
    lines.append("|" + "|".join("---" if h in ("model", "stage") else "---:" for h in headings) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body]
    return "\n".join([*lines, "", *(f"- {note}" for note in footnotes(headings))]) + "\n"
