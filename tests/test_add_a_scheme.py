"""docs/add-a-scheme.md: its package is installed; its levels are trained, rounded, exported and scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, blocks, install

import qaware
from qaware import level_plugins
from qaware.cli import main
from qaware.recipe import Recipe
from qaware.storage import load_quantized

PAGE = ROOT / "docs" / "add-a-scheme.md"
FP4 = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("scheme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(level_plugins, "_sets", {})
        with pytest.raises(qaware.QawareError, match="is not known"):
            Recipe.load("fp4-weight-only")
        install(PAGE, folder, patch)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def ran(package: Path) -> dict[str, Any]:
    """What the page's Python leaves behind."""
    pytest.importorskip("tract")
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks(PAGE):
        exec(compile(block, PAGE.name, "exec"), scope)
    return scope


@pytest.mark.parametrize("callback", ["ptq", "qat"])
def test_the_page_is_scored_on_the_runtime(ran: dict[str, Any], callback: str) -> None:
    result = ran[callback].result
    assert result.scores["tract"].nats == pytest.approx(result.scores["converted"].nats, abs=1e-5)
    assert result.artifacts["tract"].parity["relative"] < 1e-5
    labels = set(result.artifacts["tract"].layers.values())
    assert labels == {"int8 channel", {"ptq": "fp4 g32", "qat": "powers-of-two g32"}[callback]}


def test_what_training_saw_ships(ran: dict[str, Any]) -> None:
    scores = ran["qat"].result.scores
    assert scores["prepared"].nats == scores["converted"].nats


def test_the_weights_are_those_of_fp4(ran: dict[str, Any]) -> None:
    found: set[float] = set()
    for weight in ran["ptq"].result.model.weights.values():
        if weight.scheme.levels == "fp4":
            values = weight.dequantize().reshape(*weight.scale.shape, -1) / weight.scale.unsqueeze(-1)
            torch.testing.assert_close(values, values.round())
            found |= {abs(value) / 2 for value in values.round().unique().tolist()}
    assert found == FP4


def test_a_saved_model_and_a_recipe_keep_the_name(ran: dict[str, Any], tmp_path: Path) -> None:
    quantized = ran["quantized"]
    quantized.save(tmp_path / "model.qaware")
    again = load_quantized(tmp_path / "model.qaware", ran["network"])
    x = torch.randn(3, 64)
    assert torch.equal(again.module(x), quantized.module(x))
    for name, weight in again.weights.items():
        assert weight.scheme.levels == "wide"
        assert torch.equal(weight.data, quantized.weights[name].data)
    assert Recipe.load("fp4-weight-only").hash == Recipe.load(Recipe.load("fp4-weight-only").to_dict()).hash


def test_the_command_line_knows_them(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "FP4 weights in groups of 32" in capsys.readouterr().out
    assert main(["recipes", "fp4-weight-only"]) == 0
    assert "levels: fp4" in capsys.readouterr().out
    quickstart = str(ROOT / "experiments" / "quickstart.yaml")
    entry = "quantize=[{recipe: fp4-weight-only, export: [aoti, tract]}]"
    assert main(["check", quickstart, entry]) == 0
    assert "fp4 g32" in capsys.readouterr().out
    assert main(["check", quickstart, entry.replace("aoti, tract", "executorch")]) == 2
    assert "levels: fp4" in capsys.readouterr().err, "the nearest legal choice has the levels too"
