"""The layer report as a table, in files of its own and, its worst lines, in the report of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qaware.files import write_json, write_text
from qaware.layers import CEILING, LayerReport

SUFFIX = ".layers.json"
WORST = 5
_HEADINGS = ("layer", "kind", "output dB", "weight dB", "in clipped", "out clipped", "at ends")
_LEGEND = (
    "output dB, weight dB: signal to quantization noise against the float model, the worst first; that of an "
    "output has the errors of the layers before in it. clipped: share of the values beyond the int8 range; "
    "at ends: share of the weights that are the smallest or largest integer."
)
Line = Mapping[str, Any]
"""One layer as plain data."""


def write_layers(report: LayerReport, folder: Path, label: str) -> Path:
    """Write ``<label>.layers.md`` and ``.json`` and return the path of the first."""
    stem = label.replace(" ", "-")
    data = report.to_dict()
    write_json(folder / f"{stem}{SUFFIX}", {"model": label, **data})
    path = folder / f"{stem}.layers.md"
    notes = [_LEGEND, *(f"{note}." for note in data["notes"])]
    write_text(
        path,
        f"# {label}: layers\n\n{layer_table(data['layers'])}\n" + "\n".join(f"- {n}" for n in notes) + "\n",
    )
    return path


def read_layers(folder: Path) -> dict[str, list[Line]]:
    """The worst lines of each model whose layer report is in a run folder, or in its artifacts, by label."""
    found = {}
    for path in sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob(f"artifacts/*{SUFFIX}")]):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found[data["model"]] = [line for line in data["layers"] if _known(line)][:WORST]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a killed run's, or a file of another version
    return {label: lines for label, lines in found.items() if lines}


def layer_table(lines: Sequence[Line]) -> str:
    """GitHub table."""
    rows = ["| " + " | ".join(_HEADINGS) + " |", "|---|---|" + "---:|" * (len(_HEADINGS) - 2)]
    rows += ["| " + " | ".join(layer_cells(line)) + " |" for line in lines]
    return "\n".join(rows) + "\n"


def layer_cells(line: Line) -> list[str]:
    """The text of each column; empty where a figure is not known."""
    shares = (line["input_clipped"], line["output_clipped"], line["weight_at_ends"])
    return [
        str(line["name"]) or "(the model)",
        str(line["kind"]),
        _decibels(line["output_sqnr"]),
        _decibels(line["weight_sqnr"]),
        *("" if share is None else f"{share:.2%}" for share in shares),
    ]


def worst_section(folder: Path) -> list[str]:
    """Markdown for the report of ``folder``: the worst layers of each model."""
    tables = [f"### {label}\n\n{layer_table(lines)}" for label, lines in read_layers(folder).items()]
    return ["## Worst layers\n", *tables, f"{_LEGEND}\n"] if tables else []


def worst_html(folder: Path) -> str:
    """The same for the report in HTML."""
    from html import escape

    head = "".join(f"<th>{escape(heading)}</th>" for heading in _HEADINGS)
    text = ""
    for label, lines in read_layers(folder).items():
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in layer_cells(x)) + "</tr>" for x in lines
        )
        text += f"<h3>{escape(label)}</h3><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<h2>Worst layers</h2>{text}<p>{escape(_LEGEND)}</p>" if text else ""


def _known(line: Line) -> bool:
    return line["output_sqnr"] is not None or line["weight_sqnr"] is not None


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "exact" if value >= CEILING else "broken" if value <= -CEILING else f"{value:.1f}"
