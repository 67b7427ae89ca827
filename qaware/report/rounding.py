"""What rounding did to each layer: a table in files of its own; a summary in the report of a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from qaware.files import write_json, write_text
from qaware.rounding.folding import NOT_SCALED
from qaware.rounding.report import RoundingReport
from qaware.wording import counted

SUFFIX = ".rounding.json"
MOST = 10
"""Lines of a model in the report of a run."""
_HEADINGS = ("layer", "method", "error dB", "error / rtn", "tie", "note")
_LEGEND = (
    "error dB: squared error that rounding leaves in the layer's output on the calibration data, against the "
    "output's square, or in its weight where no data was used; lower is better. error / rtn: that as a share "
    "of what rounding the same weight to nearest leaves; below 1 is better."
)
_FOLDERS = ("awq: ", "smoothquant: ")
_NEAREST = {"rtn", "awq", "smoothquant", "bias-correction"}
"""Methods of these steps alone round to nearest."""
_WORSE = 1.005
Line = Mapping[str, Any]
"""One layer as plain data."""


def write_rounding(report: RoundingReport, folder: Path, label: str) -> Path:
    """Write ``<label>.rounding.md`` and ``.json`` and return the path of the first.

    Args:
        report: of the rounding of one model.
        folder: exists.
        label: the model's, as in the tables.
    """
    stem = label.replace(" ", "-")
    data = report.to_dict()
    write_json(folder / f"{stem}{SUFFIX}", {"model": label, **data})
    path = folder / f"{stem}.rounding.md"
    facts = "\n".join(f"- {line}" for line in (*summary(data["layers"]), _LEGEND))
    write_text(path, f"# {label}: rounding\n\n{rounding_table(data['layers'])}\n{facts}\n")
    return path


def read_rounding(folder: Path) -> dict[str, list[Line]]:
    """The lines of each model whose rounding report is in a run folder, or in its artifacts, by label."""
    found = {}
    for path in sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob(f"artifacts/*{SUFFIX}")]):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found[str(data["model"])] = [_line(line) for line in data["layers"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a killed run's, or a file of another version
    return {label: lines for label, lines in found.items() if lines}


def _line(data: Line) -> Line:
    return {key: data[key] for key in ("name", "method", "error", "rtn_error", "tie", "note")}


def summary(lines: Sequence[Line]) -> list[str]:
    """One sentence each: how many layers and how well, where scales went, which ties there were, and all else
    that was not done as asked, with the number of layers."""
    methods = ", ".join(dict.fromkeys(line["method"] for line in lines))
    text = f"{counted(len(lines), 'layer')} by {methods}"
    ratios = [ratio for line in lines if (ratio := _ratio(line)) is not None]
    if ratios:
        worse = sum(ratio > _WORSE for ratio in ratios)
        text += f"; error against rtn's {median(ratios):.2f} in the median"
        text += f", {min(ratios):.2f} to {max(ratios):.2f}"
        text += f", worse in {worse}" if worse else ""
    parts = [part for line in lines for part in line["note"].split("; ") if part]
    folders = [part for part in parts if part.startswith(_FOLDERS)]
    others = Counter(part for part in parts if not part.startswith(_FOLDERS))
    rest = [f"{counted(count, 'layer')}: {part}." for part, count in others.most_common(MOST)]
    return [f"{text}.", *_scales(folders), *_ties(lines), *rest]


def _scales(parts: Sequence[str]) -> list[str]:
    """Of each step that folds: how many layers it scaled, and why not the others."""
    told = []
    for step in dict.fromkeys(part.partition(": ")[0] for part in parts):
        notes = [part.partition(": ")[2] for part in parts if part.startswith(f"{step}: ")]
        reasons = Counter(n.removeprefix(f"{NOT_SCALED}, ") for n in notes if n.startswith(NOT_SCALED))
        done = len(notes) - sum(reasons.values())
        left = "".join(f"; not {counted(count, 'layer')}: {why}" for why, count in reasons.most_common(MOST))
        told.append(f"{step}: scaled what enters {counted(done, 'layer')}{left}.")
    return told


def _ties(lines: Sequence[Line]) -> list[str]:
    ties = dict.fromkeys(f"{line['name']} is {line['tie']}" for line in lines if line["tie"])
    return [f"{tie}." for tie in ties]


def rounding_table(lines: Sequence[Line]) -> str:
    """GitHub table."""
    rows = ["| " + " | ".join(_HEADINGS) + " |", "|---|---|---:|---:|---|---|"]
    rows += ["| " + " | ".join(rounding_cells(line)) + " |" for line in lines]
    return "\n".join(rows) + "\n"


def rounding_cells(line: Line) -> list[str]:
    """The text of each column; empty where a figure is not known."""
    ratio = _ratio(line)
    return [
        str(line["name"]),
        str(line["method"]),
        _decibels(line["error"]),
        "" if ratio is None else f"{ratio:.2f}",
        str(line["tie"]),
        str(line["note"]),
    ]


def worst(lines: Sequence[Line]) -> list[Line]:
    """The layers that came out worse than by rounding to nearest, the worst first."""
    worse = [line for line in lines if (_ratio(line) or 0) > _WORSE]
    return sorted(worse, key=lambda line: -(_ratio(line) or 0))[:MOST]


def rounding_section(folder: Path) -> list[str]:
    """Markdown for the report of ``folder``: of each model the summary and the worst layers."""
    parts = []
    for label, lines in read_rounding(folder).items():
        table = f"\n{rounding_table(found)}" if (found := worst(lines)) else ""
        parts.append(f"### {label}\n\n" + "".join(f"- {text}\n" for text in summary(lines)) + table)
    return ["## Rounding\n", *parts, f"{_LEGEND}\n"] if parts else []


def rounding_html(folder: Path) -> str:
    """The same for the report in HTML."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in _HEADINGS)
    text = ""
    for label, lines in read_rounding(folder).items():
        told = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary(lines))
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in rounding_cells(line)) + "</tr>"
            for line in worst(lines)
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else ""
        text += f"<h3>{escape(label)}</h3><ul>{told}</ul>{table}"
    return f"<h2>Rounding</h2>{text}<p>{escape(_LEGEND)}</p>" if text else ""


def _ratio(line: Line) -> float | None:
    """None where there is nothing to compare: without an error of rtn, or with rtn itself."""
    error, nearest = line["error"], line["rtn_error"]
    steps = {step.partition(" ")[0] for step in line["method"].split("+")}  # the rest are options
    if error is None or not nearest or steps <= _NEAREST:
        return None
    return float(error / nearest)


def _decibels(error: float | None) -> str:
    if error is None:
        return ""
    return "exact" if error <= 0 else f"{10 * math.log10(error):.1f}"
