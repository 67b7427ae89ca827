"""The README's Python runs, its commands exist, and its tables say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qaware.cli import make_parser
from qaware.exporters import BUILTIN, get_exporter
from qaware.recipe import recipe_names

README = Path(__file__).parents[1] / "README.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tract")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    with_trainer, without_training, plain, recipe = snippets("python")
    exec(with_trainer, scope)
    assert scope["qat"].result.scores["tract"].perplexity > 1
    assert scope["qat"].result.artifacts["tract"].path.exists()
    scope["model_to_quantize"] = type(scope["model"])(scope["model"].hparams["model"])
    exec(without_training, scope)
    assert scope["ptq"].result.scores["converted"].nats > 0
    exec(plain, scope)
    assert scope["same"].bytes == scope["quantized"].bytes
    exec(recipe, scope)
    assert scope["plan"].quantized


def test_every_named_recipe_is_in_the_table() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \| (?:int|float)", README.read_text(encoding="utf-8"), flags=re.M)
    assert sorted(listed) == recipe_names()


def test_every_command_exists() -> None:
    used = set(re.findall(r"^qaware (\w+)", "\n".join(snippets("console")), flags=re.M))
    choices = next(a.choices for a in make_parser()._actions if a.choices and "run" in a.choices)
    assert used == set(choices)


def test_every_experiment_is_mentioned() -> None:
    folder = README.parent / "experiments"
    assert all(
        f"experiments/{path.name}" in README.read_text(encoding="utf-8") for path in folder.glob("*.yaml")
    )


def test_the_tolerances_are_those_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    for name in BUILTIN:
        tolerance = get_exporter(name).tolerance
        row = re.search(rf"^\| `{name}` \| ([\d.e-]+) \| ([\d.e-]+) \|", text, flags=re.M)
        assert row is not None, name
        assert (float(row[1]), float(row[2])) == (tolerance.relative, tolerance.kl)
