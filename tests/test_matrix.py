"""The support matrix: what the exporters say, on the page as from the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from qaware import machine
from qaware.cli import main
from qaware.errors import QawareError
from qaware.exporters import BUILTIN, get_exporter
from qaware.exporters.aoti_product import FEATURES
from qaware.exporters.base import Exporter
from qaware.exporters.check import check
from qaware.matrix import (
    DEQUANTIZES,
    FAST,
    LANGUAGE,
    REFUSED,
    Cell,
    Line,
    batch,
    lines,
    markdown,
    reference,
    support,
)
from qaware.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "support-matrix.md"
MARK = "<!-- qaware recipes --matrix -->\n\n"


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return support(runtimes=list(BUILTIN))


def test_the_page_is_made_of_the_same_data(cells: list[Cell]) -> None:
    if why := get_exporter("executorch").missing():
        pytest.skip(why)
    if not set(FEATURES) <= set(machine.cpu()["features"]):
        pytest.skip("the page is of a CPU with AVX512-VNNI")
    assert PAGE.read_text("utf-8").partition(MARK)[2].strip() == markdown(cells).strip()


def test_every_cell_that_is_not_integers_says_why(cells: list[Cell]) -> None:
    for cell in cells:
        assert (cell.state == FAST) == (not cell.why), cell
    assert {cell.state for cell in cells} == {FAST, DEQUANTIZES, REFUSED}


def test_a_cell_is_refused_where_check_refuses(cells: list[Cell]) -> None:
    found = {(c.line.recipe, c.line.engine, c.runtime): c.state for c in cells}
    for name in ("int4-weight-only", "int8-dynamic", "torchchat-cuda"):
        plan = Recipe.load(name).match(reference(LANGUAGE))
        for runtime in BUILTIN:
            exporter = get_exporter(runtime)
            problems = [p for p in check(plan, [exporter]) if p.message != exporter.missing()]
            assert (found[name, "modules", runtime] == REFUSED) == bool(problems), (name, runtime)


def test_rows_are_those_that_an_engine_can_prepare() -> None:
    rows = {name: lines(Recipe.load(name), name) for name in ("int8-static", "int4-weight-only")}
    assert [(r.engine, r.network) for r in rows["int8-static"]] == [("eager", "vision"), ("graph", "vision")]
    assert rows["int4-weight-only"] == [Line("int4-weight-only", "modules", LANGUAGE)]


def test_an_exporter_that_does_not_say_is_not_called_fast() -> None:
    decision = next(
        iter(Recipe.load("int8-dynamic").match(nn.Sequential(nn.Linear(8, 4))).quantized.values())
    )
    assert "is not said" in str(Exporter.unpacks(get_exporter("tract"), decision))


def test_a_reason_is_listed_once_with_its_recipes() -> None:
    one, two = Line("a", "modules", LANGUAGE), Line("b", "graph", LANGUAGE)
    text = markdown([Cell(one, "x", REFUSED, ("too wide",)), Cell(two, "x", REFUSED, ("too wide",))])
    assert text.count("too wide") == 1
    assert "- no: too wide (a, b by graph)" in text


def test_the_command_prints_a_recipe_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "int4-weight-only", "--matrix"]) == 0
    table = capsys.readouterr().out
    assert "| `int4-weight-only` | modules | no " in table
    assert "- no: weight-only int4 linear layers lose their scales on XNNPACK" in table


def test_a_recipe_for_other_layers_has_no_rows() -> None:
    recipe = '{"rules": [{"type": "LSTM", "scheme": {"bits": 8}}]}'
    with pytest.raises(QawareError, match="quantizes nothing in the reference networks"):
        support([recipe])


def test_batches_are_those_of_the_network() -> None:
    assert reference(LANGUAGE)(batch(LANGUAGE)).shape[:2] == batch(LANGUAGE).shape
