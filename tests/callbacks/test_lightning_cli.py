"""The callbacks in a user's ``LightningCLI`` script: class paths, overlays, help, saved configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lit import Counting, LitLM
from torch.utils.data import DataLoader

from qaware import PostTrainingQuantization, QuantizationAwareTraining, Recipe
from qaware.overlays import overlay_names, read_overlay
from qaware.report.ledger import read_rows

QAT = "--trainer.callbacks+=qaware.callbacks.QuantizationAwareTraining"
PTQ = "--trainer.callbacks+=qaware.callbacks.PostTrainingQuantization"
RECIPE = {"name": "three", "rules": [{"type": "Linear", "scheme": {"bits": 3}}]}
SCRIPT = """
from lightning.pytorch.cli import LightningCLI
from test_lightning_cli import Data, LitLM
LightningCLI(LitLM, Data)
"""


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Counting(0), batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(Counting(9), batch_size=8)


@pytest.fixture(autouse=True)
def config() -> Path:
    """What the user had before: a configuration with a callback of their own."""
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer["enable_model_summary"] = False
    trainer["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept"}}]
    path = Path("config.yaml")
    path.write_text(yaml.safe_dump({"seed_everything": 0, "trainer": trainer}))
    return path


def build(*arguments: str) -> list[pl.Callback]:
    """The user's callback and those of qaware, without running anything."""
    cli = LightningCLI(LitLM, Data, args=["--config", "config.yaml", *arguments], run=False)
    kinds = (ModelCheckpoint, QuantizationAwareTraining, PostTrainingQuantization)
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kinds)]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    Path("train.py").write_text(SCRIPT)
    command = [sys.executable, "train.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.parametrize("form", ["yaml file", "json", "yaml"])
def test_a_recipe_of_ones_own(form: str) -> None:
    Path("three.yaml").write_text(yaml.safe_dump(RECIPE))
    given = {
        "yaml file": "three.yaml",
        "json": json.dumps(RECIPE),
        "yaml": "{name: three, rules: [{type: Linear, scheme: {bits: 3}}]}",
    }
    qat = build(QAT, f"--trainer.callbacks.recipe={given[form]}")[0]
    assert isinstance(qat, QuantizationAwareTraining)
    assert qat.recipe == Recipe.from_dict(RECIPE)


def test_arguments_go_to_the_callback_before_them() -> None:
    qat, ptq, theirs = build(
        QAT,
        "--trainer.callbacks.recipe=int8-dynamic-int4-weight",
        "--trainer.callbacks.start_step=7",
        "--trainer.callbacks.export=[tract]",
        PTQ,
        "--trainer.callbacks.recipe=int8-static",
        "--trainer.callbacks.calibration_batches=3",
    )
    assert isinstance(theirs, ModelCheckpoint), "theirs stays (the Trainer puts checkpoints last)"
    assert isinstance(qat, QuantizationAwareTraining)
    assert isinstance(ptq, PostTrainingQuantization)
    assert (qat.recipe.name, qat.start_step, len(qat.exporters)) == ("int8-dynamic-int4-weight", 7, 1)
    assert (ptq.recipe.name, ptq.calibration_batches) == ("int8-static", 3)


@pytest.mark.parametrize("name", overlay_names())
def test_an_overlay_adds_its_callback_and_can_be_overridden(name: str) -> None:
    Path(f"{name}.yaml").write_text(read_overlay(name))
    ours, theirs = build("--config", f"{name}.yaml", "--trainer.callbacks.recipe=int8-weight-only")
    assert isinstance(theirs, ModelCheckpoint)
    assert type(ours).__name__ in read_overlay(name)
    assert ours.recipe.name == "int8-weight-only"  # type: ignore[attr-defined]
    if name == "qat-distill":
        assert ours.distillation == 1.0  # type: ignore[attr-defined]


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        LightningCLI(LitLM, Data, args=["fit", f"{QAT[:19]}.help={QAT.partition('=')[2]}"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    options = said.partition("convert a copy when it ends")[2].split("\n  --trainer.callbacks.")[1:]
    assert len(options) == 17
    for option in options:
        described = option.partition("\n")[2].partition("(type")[0].partition("(required")[0]
        assert described.strip(), f"nothing is said about {option.split()[0]}"


def test_print_config_shows_all_that_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "--trainer.callbacks.recipe=int8-dynamic"
    with pytest.raises(SystemExit):
        LightningCLI(LitLM, Data, args=["fit", "--config=config.yaml", QAT, recipe, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert shown[1]["class_path"] == "qaware.callbacks.QuantizationAwareTraining"
    assert shown[1]["init_args"]["recipe"] == "int8-dynamic"
    assert shown[1]["init_args"]["start_step"] == 0


def test_a_saved_configuration_runs_again() -> None:
    """What SaveConfigCallback writes beside the run, given back, makes the same run."""
    nats = []
    arguments = ["--config=config.yaml", QAT, f"--trainer.callbacks.recipe={json.dumps(RECIPE)}"]
    for again in (False, True):
        if again:
            arguments = ["--config=first/config.yaml"]
        folder = "second" if again else "first"
        arguments.append(f"--trainer.default_root_dir={folder}")
        LightningCLI(LitLM, Data, args=["fit", *arguments])
        rows = read_rows(Path(folder) / "quantized" / "results.jsonl")
        nats.append([(row["model"], row["stage"], row["nats"]) for row in rows])
    assert nats[0] == nats[1]
    assert [row[:2] for row in nats[0]][-1] == ("three qat", "converted")


def test_a_script_of_three_lines_fits_in_its_own_process() -> None:
    recipe = ["--trainer.callbacks.recipe=int8-dynamic-int4-weight", "--trainer.callbacks.start_step=2"]
    fit = script("fit", "--config=config.yaml", "--trainer.default_root_dir=fit", QAT, *recipe)
    assert fit.returncode == 0, fit.stderr[-2000:]
    rows = read_rows(Path("fit/quantized/results.jsonl"))
    assert [row["stage"] for row in rows] == ["float", "prepared", "converted"]


def test_an_overlay_validates() -> None:
    Path("ptq.yaml").write_text(read_overlay("ptq"))
    files = ["--config=config.yaml", "--config=ptq.yaml", "--trainer.default_root_dir=validate"]
    LightningCLI(LitLM, Data, args=["validate", *files])
    rows = read_rows(Path("validate/quantized/results.jsonl"))
    assert [row["model"] for row in rows] == ["float", "int8-dynamic ptq"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--trainer.callbacks.recipe=int8-dynamc"], "recipe: 'int8-dynamc' is not known; did you mean"),
        (["--trainer.callbacks.recipe=none.yaml"], "none.yaml: cannot be read (No such file or directory)"),
        (["--trainer.callbacks.recipe={ruls: []}"], "recipe: unknown key 'ruls'; did you mean 'rules'?"),
        (
            ["--trainer.callbacks.recipe=float16", "--trainer.callbacks.start_step=-1"],
            "start_step: -1 must be 0 or more",
        ),
        (
            ["--trainer.callbacks.recipe=float16", "--trainer.callbacks.distillation=2"],
            "distillation: 2.0 must be a share of the loss between 0 (none) and 1",
        ),
    ],
)
def test_a_bad_value_is_named_in_one_line(arguments: list[str], line: str) -> None:
    """Before the model or its data is built. jsonargparse puts around that line which other types of
    callbacks do not fit either."""
    with pytest.raises(ValueError, match="Errors:") as refused:
        build(QAT, *arguments)
    (said,) = [text for text in str(refused.value).splitlines() if line in text]
    assert said.startswith("  - ")


@pytest.mark.parametrize(
    ("argument", "line"),
    [("strt_step=1", "Option 'strt_step' is not accepted"), ("start_step=x", "Expected a <class 'int'>")],
)
def test_a_misspelt_key_or_a_wrong_type_exits(
    argument: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        build(QAT, "--trainer.callbacks.recipe=float16", f"--trainer.callbacks.{argument}")
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err
