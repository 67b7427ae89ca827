"""The rows of a benchmark: what was published, what is to be reached, what came out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    row: str
    published: str
    target: str
    value: str
    met: bool | None
    """None where it could not be measured; ``value`` says why."""
    case: str = ""
    """Model, grid, seed and steps."""
    missed_by: str = ""
    details: list[dict[str, Any]] = field(default_factory=list)
    """What the value was computed from: one mapping for each model, with interval and KL."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def write(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """``{"rows": [...], "about": {...}}`` as JSON, after each row, so that a killed run keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    data = {"rows": [row.to_dict() for row in rows], "about": about}
    temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(rows: list[Row]) -> str:
    """GitHub table of all rows, and below it what each was computed from."""
    lines = ["| row | published | to reach | measured | met |", "|---|---|---|---|---|"]
    lines += [f"| {r.row} | {r.published} | {r.target} | {r.value} | {_met(r)} |" for r in rows]
    for row in rows:
        lines += ["", f"**{row.row}**: {row.case}", ""]
        lines += [_detail(detail) for detail in row.details]
    return "\n".join(lines) + "\n"


def _met(row: Row) -> str:
    if row.met is None:
        return "not measured"
    return "yes" if row.met else f"no{f', {row.missed_by}' if row.missed_by else ''}"


def _detail(detail: dict[str, Any]) -> str:
    values = ", ".join(f"{k} {_shown(v)}" for k, v in detail.items() if k != "model" and v is not None)
    return f"- {detail['model']}: {values}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
