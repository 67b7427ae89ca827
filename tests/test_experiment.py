"""The main job on a tiny model: every stage, every runtime, one golden table; and the mistakes users make."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qaware.callbacks import PostTrainingQuantization
from qaware.cli import main
from qaware.experiment import Experiment, read_experiment
from qaware.exporters.artifact import Artifact
from qaware.report.ledger import Comparison, read_rows
from qaware.run import Run

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "tiny.json"
RECIPE = "int8-dynamic-int4-weight"


def text(lines: int = 500) -> str:
    """Sentences with enough rule in them for a tiny model to learn some."""
    things = ["stone", "river", "cloud", "lamp", "garden", "window", "letter"]
    verbs = ["holds", "follows", "leaves", "meets", "counts"]
    return "\n".join(
        f"{i}. The {things[i * i % 7]} {verbs[i % 5]} the {things[(i + 3) % 7]}, and {i % 9} remain."
        for i in range(lines)
    )


def config(folder: Path) -> dict[str, Any]:
    source = folder / "text.txt"
    source.write_text(text())
    model = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    data = {
        "source": str(source),
        "tokenizer": 320,
        "block_size": 64,
        "batch_size": 8,
        "max_val_windows": 20,
        "cache_dir": str(folder / "cache"),
    }
    return {
        "name": "tiny",
        "output": str(folder / "runs"),
        "model": {"class_path": "qaware.lm.CausalLM", "init_args": {"model": model, "lr": 5e-3}},
        "data": {"class_path": "qaware.lm.TextDataModule", "init_args": data},
        "trainer": {"max_steps": 60, "accelerator": "cpu", "enable_progress_bar": False},
        "quantize": [{"recipe": RECIPE}],
    }


def run(settings: dict[str, Any], folder: Path, *more: str) -> int:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return main(["run", str(path), *more])


def only_run(folder: Path) -> Path:
    return next((folder / "runs" / "tiny").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with both methods and three runtimes; the slowest fixture, shared by many assertions."""
    for package in ("executorch", "tract"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("experiment")
    settings = config(folder)
    settings["finetune"] = {"max_steps": 30, "lr": 2e-3}
    settings["quantize"] = [{"recipe": RECIPE, "methods": ["qat"], "export": ["executorch", "aoti", "tract"]}]
    assert run(settings, folder) == 0
    return only_run(folder)


def by_stage(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["model"], row["stage"]): row for row in read_rows(folder / "results.jsonl")}


def test_every_stage_has_a_row(finished: Path) -> None:
    assert list(by_stage(finished)) == [
        ("float", "float"),
        ("float control", "float"),
        (f"{RECIPE} ptq", "converted"),
        *((f"{RECIPE} qat", s) for s in ("prepared", "converted", "executorch", "aoti", "tract")),
    ]


def test_rows_are_comparable(finished: Path) -> None:
    rows = by_stage(finished)
    assert len({row["fingerprint"] for row in rows.values()}) == 1
    control = rows["float control", "float"]
    for (model, stage), row in rows.items():
        assert {"model", "stage", "nats", "perplexity", "bytes", "fingerprint"} <= row.keys()
        if model.endswith(("ptq", "qat")):
            assert row["base"] == "float control", stage
            assert row["d_nats"] == pytest.approx(row["nats"] - control["nats"], abs=1e-9)


def test_hops_cost_next_to_nothing(finished: Path) -> None:
    rows = by_stage(finished)
    prepared = rows[f"{RECIPE} qat", "prepared"]
    assert rows[f"{RECIPE} qat", "converted"]["nats"] == pytest.approx(prepared["nats"], abs=1e-7)
    for runtime in ("executorch", "aoti", "tract"):
        assert rows[f"{RECIPE} qat", runtime]["nats"] == pytest.approx(prepared["nats"], abs=5e-3), runtime
        assert rows[f"{RECIPE} qat", runtime]["parity"]["top1"] > 0.97


def test_artifacts_are_int4_and_verified(finished: Path) -> None:
    rows = by_stage(finished)
    for runtime in ("executorch", "aoti", "tract"):
        row = rows[f"{RECIPE} qat", runtime]
        artifact = Artifact.open(finished / "artifacts" / row["artifact"])
        assert artifact.parity is not None
        assert artifact.recipe["name"] == RECIPE
        assert artifact.layers["model.lm_head"] == "int4 g32 + int8-dynamic"
        assert artifact.signature.inputs[0].high == 319
    # The other two carry some hundred kilobytes of program beside a model this small.
    assert rows[f"{RECIPE} qat", "tract"]["bytes"] < 0.25 * rows["float", "float"]["bytes"]


def test_the_golden_table(finished: Path) -> None:
    """Figures of this tiny run on the machine that recorded them; other processors round a little otherwise.

    ``QAWARE_RECORD_GOLDEN=1`` writes the file anew."""
    found = [
        {k: row.get(k) for k in ("model", "stage", "nats", "bytes")} for row in by_stage(finished).values()
    ]
    if os.environ.get("QAWARE_RECORD_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for expected, row in zip(golden, found, strict=True):
        assert (row["model"], row["stage"]) == (expected["model"], expected["stage"])
        assert row["nats"] == pytest.approx(expected["nats"], abs=0.03), row
        assert row["bytes"] == pytest.approx(expected["bytes"], rel=0.1), row


def test_the_run_folder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((finished / "run.json").read_text())
    assert about["status"] == "finished"
    assert {"torch", "torchao"} <= about["versions"].keys()
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["seed"] == 0, "defaults are written out too"
    assert resolved["finetune"] == {"max_steps": 30, "lr": 2e-3}
    for name in ("float", "float-control", f"{RECIPE}-qat"):
        torch.load(finished / "checkpoints" / f"{name}.ckpt", weights_only=True)
    before = (finished / "report.md").read_text()
    for name in ("report.md", "report.html", "loss.png"):
        (finished / name).unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.md").read_text() == before
    assert (finished / "loss.png").stat().st_size > 10_000
    assert "executorch" in capsys.readouterr().out


def test_an_artifact_is_evaluated_later(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = next((finished / "artifacts").glob("*.nnef.tgz"))
    other = finished / "other.txt"
    other.write_text(text(60))
    assert main(["evaluate", str(artifact), "--data", str(other), "--max-windows", "5"]) == 0
    assert "tract" in capsys.readouterr().out
    (finished / "short.txt").write_text("")
    assert main(["evaluate", str(artifact), "--data", str(finished / "short.txt")]) == 2
    damaged = finished / "artifacts" / "damaged.nnef.tgz"
    damaged.write_bytes(artifact.read_bytes()[:-100])
    damaged.with_name(damaged.name + ".json").write_text(
        artifact.with_name(artifact.name + ".json").read_text()
    )
    capsys.readouterr()
    assert main(["evaluate", str(damaged), "--data", str(other)]) == 2
    assert "is damaged or was changed" in capsys.readouterr().err


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings["finetune"] = {"max_steps": 100_000}
    settings["quantize"] = [{"recipe": RECIPE, "methods": ["qat"]}]
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    child = subprocess.Popen(
        [sys.executable, "-m", "qaware.cli", "run", str(path)], stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/tiny/*/results.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert main(["report", str(tmp_path / "runs" / "tiny")]) == 0
    folder = only_run(tmp_path)
    assert [row["model"] for row in read_rows(folder / "results.jsonl")] == ["float"]
    assert "This run is not finished" in (folder / "report.md").read_text()
    assert (folder / "checkpoints" / "float.ckpt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "nam"),
        ({"quantize": []}, "quantize: is empty"),
        ({"quantize": [{"recipe": "int5"}]}, "recipe: 'int5' is not known; did you mean 'int"),
        ({"quantize": [{"recipe": RECIPE, "methods": ["qta"]}]}, "methods: 'qta' is not one of ptq, qat"),
        ({"quantize": [{"recipe": RECIPE, "methods": []}]}, "methods: is empty; give ptq, qat or both"),
        ({"quantize": [{"recipe": RECIPE, "methods": ["qat"]}], "finetune": None}, "finetune: is missing"),
        (
            {"quantize": [{"recipe": RECIPE}, {"recipe": RECIPE, "engine": "eagre"}]},
            "quantize[1]: engine: 'eagr",
        ),
        (
            {"quantize": [{"recipe": RECIPE, "calibration_batches": 0}]},
            "calibration_batches: 0 must be at le",
        ),
        (
            {"quantize": [{"recipe": RECIPE, "methods": ["qat"], "start_step": -1}]},
            "start_step: -1 must be 0",
        ),
        ({"finetune": {"max_steps": -1}}, "finetune.max_steps: -1 must be at least 1"),
        ({"finetune": {"max_steps": 4, "lr": -1.0}}, "finetune.lr: -1.0 must be above 0"),
        ({"seed": -1}, "seed: -1 must be 0 to 4294967295"),
        ({"on_failure": "ignore"}, "on_failure: 'ignore' is not one of raise, warn"),
        ({"trainer": {"accelerator": "abacus"}}, "trainer: "),
        ({"trainer": {"callbacks": 3}}, "trainer.callbacks: 3 must be {class_path"),
        (
            {"trainer": {"callbacks": [{"class_path": "qaware.Recipe"}]}},
            "is not a lightning.pytorch.callbacks",
        ),
        ({"quantize": [{"recipe": RECIPE, "export": ["onnx"]}]}, "runtime: 'onnx' is not one of"),
        ({"quantize": [{"recipe": RECIPE, "target": "nope"}]}, "nope"),
        ({"quantize": [{"recipe": RECIPE, "rounding": "gtpq"}]}, "rounding: 'gtpq' is not one of"),
        ({"quantize": [{"recipe": RECIPE, "rounding": {"gptq": {"dampin": 1}}}]}, "did you mean 'damping'?"),
        ({"quantize": [{"recipe": RECIPE, "rounding": ["gptq", "awq"]}]}, "which must be [awq, gptq]"),
        ({"quantize": [{"recipe": RECIPE, "rounding": []}]}, "rounding: [] must be a name such as gptq"),
        ({"quantize": [{"recipe": RECIPE, "rules": [{"name": "*.dwn_proj"}]}]}, "matches no module"),
        ({"trainer": {"max_stesp": 3}}, "max_stesp"),
        ({"model.init_args.model.hidden_sizes": 3}, "hidden_sizes"),
        ({"model.init_args.model.vocab_size": 100}, "vocab"),
        (
            {"model.init_args.model.intermediate_size": 100},
            "down_proj: group_size 32 does not divide its 100",
        ),
        ({"data.init_args.source": "missing.txt"}, "missing.txt"),
    ],
)
def test_mistakes(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path)
    overrides = [f"{k}={json.dumps(v)}" for k, v in change.items() if "." in k]
    settings.update({k: v for k, v in change.items() if "." not in k})
    assert run(settings, tmp_path, *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qaware: error: ")
    assert message in error


def test_entries_with_the_same_label_are_told_apart(tmp_path: Path) -> None:
    made = Run(read_experiment(config(tmp_path)))
    callbacks = [PostTrainingQuantization(RECIPE) for _ in range(3)]
    for callback in callbacks:
        made._connect(callback, Comparison("float"))
    assert [c.label for c in callbacks] == [f"{RECIPE} ptq", f"{RECIPE} ptq 2", f"{RECIPE} ptq 3"]


def test_callbacks_and_loggers_of_the_file_are_made_for_each_trainer(tmp_path: Path) -> None:
    stop = "lightning.pytorch.callbacks.EarlyStopping"
    monitor = {"class_path": stop, "init_args": {"monitor": "val_loss"}}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    settings = config(tmp_path)
    settings["trainer"] |= {"callbacks": [monitor], "logger": logger}
    made = Run(read_experiment(settings))
    assert yaml.safe_load((made.folder / "config.yaml").read_text())["trainer"] == settings["trainer"]
    trainers = [made._trainer(made.experiment.trainer or {}, "float") for _ in range(2)]
    stoppers = [trainer.early_stopping_callback for trainer in trainers]
    assert [stopper.monitor for stopper in stoppers if stopper] == ["val_loss"] * 2
    assert stoppers[0] is not stoppers[1]
    assert [type(trainer.logger).__name__ for trainer in trainers] == ["CSVLogger"] * 2


def test_too_short_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path)
    (tmp_path / "text.txt").write_text("One line.")
    assert run(settings, tmp_path) == 2
    assert "tokens" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(config(tmp_path), tmp_path, f"output={tmp_path / 'file' / 'runs'}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_check_says_the_fate_of_every_parameter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path)))
    assert main(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "model.model.norm.weight" in shown
    assert "no rule matches" in shown
    assert not (tmp_path / "runs").exists()


def test_check_offers_a_choice_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A feedforward of 172, as in stories260K, that groups of 32 do not divide."""
    settings = config(tmp_path)
    settings["model"]["init_args"]["model"]["intermediate_size"] = 172
    settings["quantize"] = [{"recipe": RECIPE, "export": ["executorch", "aoti", "tract"]}]
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert (
        "layers.0.mlp.down_proj: group_size 32 does not divide its 172 input weights; nearest legal: int8"
        in error
    )
    assert "legal as they are: float16, int4-static, int8-dynamic, int8-static" in error
    rule = yaml.safe_load(re.findall(r"by the first rule (\{name: .*?\}\})", error)[0])
    settings["quantize"][0]["rules"] = [rule]
    path.write_text(yaml.safe_dump(settings))
    assert main(["check", str(path)]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_experiments_are_valid(path: Path) -> None:
    experiment = read_experiment(yaml.safe_load(path.read_text()))
    assert isinstance(experiment, Experiment)
    for entry in experiment.quantize:
        assert entry.load_recipe().rules


def test_the_hub_experiment_on_local_files(tmp_path: Path, finished: Path) -> None:
    """experiments/wikitext.yaml with a local folder in place of the hub's model, tokenizer and data."""
    from qaware.lm import CausalLM

    settings = config(tmp_path)
    model = CausalLM(copy.deepcopy(settings["model"]["init_args"]["model"]))
    folder = tmp_path / "model"
    model.model.save_pretrained(folder)
    for file in (finished / "artifacts" / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    overrides = {
        "model.init_args.model": str(folder),
        "data.init_args.tokenizer": str(folder),
        "data.init_args.source": str(tmp_path / "text.txt"),
        "data.init_args.config": "null",
        "data.init_args.block_size": "64",
        "data.init_args.max_val_windows": "5",
        "data.init_args.cache_dir": str(tmp_path / "cache"),
        "finetune.max_steps": "4",
        "quantize": "[{recipe: int8-dynamic-int4-weight, methods: [ptq, qat]}]",
        "output": str(tmp_path / "runs"),
        "name": "tiny",
    }
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    assert main(["run", str(ROOT / "experiments" / "wikitext.yaml"), *arguments]) == 0
    assert (f"{RECIPE} qat", "converted") in by_stage(only_run(tmp_path))


def test_stories260k(shared_data: Path, tmp_path: Path) -> None:
    """The trained checkpoint: known perplexities, and the 172-wide layer with the choice that check names."""
    arguments = [
        f"model.init_args.model={shared_data / 'lm/stories260K/hf'}",
        f"data.init_args.tokenizer={shared_data / 'lm/stories260K/hf'}",
        f"data.init_args.source={shared_data / 'text/tinystories_dev.txt'}",
        f"data.init_args.val_source={shared_data / 'text/tinystories_dev.txt'}",
        f"data.init_args.cache_dir={tmp_path / 'cache'}",
        f"output={tmp_path / 'runs'}",
        "name=tiny",
    ]
    experiment = str(ROOT / "experiments" / "stories260k.yaml")
    recipes = (
        "quantize=[{recipe: int8-weight-only},"
        " {recipe: int4-weight-only, rules: [{name: '*.down_proj', scheme: {bits: 4}}]}]"
    )
    assert main(["run", experiment, *arguments, recipes]) == 0
    rows = by_stage(only_run(tmp_path))
    assert rows["float", "float"]["perplexity"] == pytest.approx(4.384, abs=1e-3)
    assert rows["float", "float"]["count"] == 79_255
    assert rows["int8-weight-only ptq", "converted"]["perplexity"] == pytest.approx(4.387, abs=2e-3)
    # torchao rounds on absmax / 7.5; other int4 grids give 5.1 to 5.3 here.
    assert rows["int4-weight-only+ ptq", "converted"]["perplexity"] == pytest.approx(5.240, abs=0.02)
