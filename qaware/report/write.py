"""The report of a run folder: ``report.md``, ``report.html`` and the plot, rebuilt from its files."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qaware.files import write_text
from qaware.report.layers import worst_html, worst_section
from qaware.report.ledger import Row, read_rows
from qaware.report.plot import plot_loss
from qaware.report.rounding import rounding_html, rounding_section
from qaware.report.table import cells, footnotes, markdown

RESULTS, PLOT, REPORT = "results.jsonl", "loss.png", "report.md"


def write_report(folder: Path, rows: Sequence[Row] | None = None) -> Path:
    """Write the report of ``folder`` and return the path of ``report.md``.

    Args:
        folder: has ``results.jsonl`` and, when an experiment made it, ``run.json``.
        rows: instead of those in ``results.jsonl``.

    Raises:
        QawareError: there is no readable ``results.jsonl``.
    """
    rows = list(rows if rows is not None else read_rows(folder / RESULTS))
    about = _about(folder)
    title = f"qaware: {about.get('name', folder.name)}"
    plotted = plot_loss(rows, folder / PLOT, about.get("name", folder.name))
    layers = [*worst_section(folder), *rounding_section(folder)]
    write_text(folder / REPORT, _markdown(title, rows, about, plotted, layers))
    image = folder / PLOT if plotted else None
    tables = worst_html(folder) + rounding_html(folder)
    write_text(folder / "report.html", _html(title, rows, about, image, tables))
    return folder / REPORT


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # A callback's folder has none, and a report without it is still a report.
    return about if isinstance(about, dict) else {}


def _facts(rows: Sequence[Row], about: dict[str, Any]) -> list[str]:
    """Protocol, machine and notes: what a number means nothing without."""
    facts = []
    if about.get("status") and about["status"] != "finished":
        facts.append(f"This run is {about['status']}: stages may be missing.")
    for row in {r.get("fingerprint"): r for r in rows if r.get("protocol")}.values():
        protocol = ", ".join(f"{k} {v}" for k, v in row["protocol"].items())
        facts.append(f"Protocol {row['fingerprint']}: {protocol}.")
    if "cpu" in about:
        facts.append(f"CPU: {about['cpu']['model']} ({' '.join(about['cpu']['features'])}).")
    if "versions" in about:
        facts.append("Versions: " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()) + ".")
    notes = dict.fromkeys(f"{r['stage']}: {n}." for r in rows for n in r.get("notes", ()))
    failures = [f"{r['model']}, {r['stage']} FAILED: {r['failed']}" for r in rows if r.get("failed")]
    return [*facts, *notes, *failures]


def _markdown(
    title: str, rows: Sequence[Row], about: dict[str, Any], plotted: bool, layers: Sequence[str]
) -> str:
    parts = [f"# {title}\n", markdown(rows)]
    if plotted:
        parts.append(f"![nats lost against bytes]({PLOT})\n")
    parts += [f"- {fact}" for fact in _facts(rows, about)]
    parts += ["", *layers] if layers else []
    return "\n".join(parts) + "\n"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}img{max-width:100%}li{color:#444;font-size:90%}"
)


def _html(title: str, rows: Sequence[Row], about: dict[str, Any], plot: Path | None, layers: str) -> str:
    """One file with the plot inside, to be mailed or attached."""
    headings, body = cells(rows)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in body)
    image = ""
    if plot is not None:
        data = base64.b64encode(plot.read_bytes()).decode()
        image = f'<p><img alt="nats lost against bytes" src="data:image/png;base64,{data}"></p>'
    notes = "".join(f"<li>{html.escape(t)}</li>" for t in [*footnotes(headings), *_facts(rows, about)])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table>{image}<ul>{notes}</ul>{layers}</html>\n"
    )
