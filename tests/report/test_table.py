"""The table: only columns that hold something, and nothing that a name can break."""

from __future__ import annotations

import io
from typing import Any

import pytest

from qaware.report.table import FOOTNOTES, cells, footnotes, markdown, print_table, size_text


def row(model: str = "m", stage: str = "float", **values: Any) -> dict[str, Any]:
    return {"model": model, "stage": stage, "bytes": 1500, **values}


def test_columns_appear_only_when_a_row_fills_them() -> None:
    assert cells([row()])[0] == ["model", "stage", "size"]
    assert cells([])[0] == ["model", "stage", "size"]
    filled = [row(), row(nats=1.0, kl=None, accuracy=None, parity=None)]
    assert cells(filled)[0] == ["model", "stage", "nats", "size"]


@pytest.mark.parametrize(
    ("values", "heading", "text"),
    [
        ({"accuracy": 0.91236}, "accuracy", "91.24%"),
        ({"d_accuracy": -0.0123456, "d_accuracy_ci95": 0.00456}, "d-acc", "-1.23 ±0.46"),
        ({"d_accuracy": 0.0}, "d-acc", "+0.00"),
        ({"sqnr": 31.25}, "SQNR", "31.2"),
        ({"nats": 1.23456}, "nats", "1.2346"),
        ({"nats": 0.0}, "nats", "0.0000"),
        ({"perplexity": 4.38449}, "ppl", "4.384"),
        ({"d_nats": 0.01234, "d_nats_ci95": 0.00456}, "d-nats", "+0.0123 ±0.0046"),
        ({"d_nats": -0.5, "d_nats_ci95": None}, "d-nats", "-0.5000"),
        ({"d_nats": 0.0}, "d-nats", "+0.0000"),
        ({"ptq_loss_nats": 0.4, "recovered": 0.754}, "recovered", "75%"),
        ({"ptq_loss_nats": 0.4, "recovered": 0.0}, "recovered", "0%"),
        ({"ptq_loss_nats": 0.4}, "recovered", "n.s."),
        ({"kl": 0.000123}, "KL", "1.23e-04"),
        ({"top1": 0.98765}, "top-1", "98.8%"),
        ({"bits_per_byte": 2.34567}, "bits/byte", "2.346"),
        ({"parity": {"relative": 1.26e-6, "kl": 0}}, "parity", "1e-06"),
        ({"extra": {"bleu": 0.123456}}, "bleu", "0.1235"),
    ],
)
def test_every_cell(values: dict[str, Any], heading: str, text: str) -> None:
    headings, body = cells([row(**values)])
    assert dict(zip(headings, body[0], strict=True))[heading] == text


def test_a_row_without_the_figure_has_an_empty_cell() -> None:
    headings, body = cells([row(nats=1.0, extra={"a": 1.0}), row(stage="aoti", extra={"b": None})])
    assert headings == ["model", "stage", "nats", "size", "a"]
    assert body[1] == ["", "aoti", "", "1.50 kB", ""]


def test_a_classifier_has_no_perplexity_and_a_language_model_no_accuracy() -> None:
    values = {"nats": 1.0, "perplexity": None, "bits_per_byte": None, "accuracy": 0.9, "sqnr": 30.0}
    assert cells([row(**values)])[0] == ["model", "stage", "accuracy", "nats", "SQNR", "size"]
    assert cells([row(nats=1.0, perplexity=2.7)])[0] == ["model", "stage", "nats", "ppl", "size"]


def test_a_repeated_name_is_blank_but_not_one_that_comes_back() -> None:
    names = [line[0] for line in cells([row("a"), row("a"), row("a"), row("b"), row("a")])[1]]
    assert names == ["a", "", "", "b", "a"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_250_000, "1.25 MB"),
        (999_994, "999.99 kB"),
        (999_999, "1.00 MB"),
        (5_000_000_000, "5.00 GB"),
        (7_000_000_000_000, "7000.00 GB"),
    ],
)
def test_size_text(count: int, text: str) -> None:
    assert size_text(count) == text


def test_footnotes_explain_the_shown_columns_only() -> None:
    assert footnotes(["model", "nats"]) == []
    assert footnotes(["d-nats", "parity"]) == [FOOTNOTES["d-nats"], FOOTNOTES["parity"]]
    everything = row(
        d_accuracy=0.1,
        d_nats=1.0,
        ptq_loss_nats=1.0,
        kl=1.0,
        sqnr=9.0,
        parity={"relative": 1.0, "steps": 1.0},
    )
    assert footnotes(cells([everything])[0]) == list(FOOTNOTES.values())


def test_markdown() -> None:
    text = markdown([row(nats=1.0), row(stage="converted", nats=1.5, d_nats=0.5)])
    assert text.splitlines() == [
        "| model | stage | nats | d-nats | size |",
        "|---|---|---:|---:|---:|",
        "| m | float | 1.0000 |  | 1.50 kB |",
        "|  | converted | 1.5000 | +0.5000 | 1.50 kB |",
        "",
        f"- {FOOTNOTES['d-nats']}",
    ]


def test_a_pipe_in_a_name_does_not_add_a_column() -> None:
    line = markdown([row("a|b")]).splitlines()[2]
    assert line == "| a\\|b | float | 1.50 kB |"


def printed(rows: list[dict[str, Any]], width: int, title: str = "") -> str:
    file = io.StringIO()
    print_table(rows, title, file=file, width=width)
    return file.getvalue()


def test_a_narrow_terminal_cuts_no_number() -> None:
    wide = row("a rather long name of a model", nats=1.23456, d_nats=0.1, d_nats_ci95=0.02, top1=0.5)
    text = printed([wide], width=20)
    for part in ("a rather long name of a model", "1.2346", "+0.1000 ±0.0200", "50.0%", "1.50 kB"):
        assert part in text
    assert "…" not in text


def test_names_are_no_markup() -> None:
    text = printed([row("[red]a[/red] [b]")], width=100, title="[x] title")
    assert "[red]a[/red] [b]" in text
    assert "[x] title" in text
    printed([row("[/oops]", failed="x")], width=100)


def test_the_cells_of_the_terminal_are_those_of_the_report() -> None:
    rows = [row(nats=1.0), row(stage="aoti", nats=2.0)]
    text = printed(rows, width=100)
    for line in cells(rows)[1]:
        assert all(cell in text for cell in line)
