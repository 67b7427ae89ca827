"""The two commands on a tiny experiment, and the mistakes that they find before anything expensive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qaware.cli import main
from qaware.recipe import Recipe
from qaware.report.ledger import read_rows

RULE = {"type": "Linear", "scheme": {"bits": 3, "group_size": 32, "scale_dtype": "bfloat16"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``experiment.yaml``: a language model that trains for a moment."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = [f"{i}. The stone {i * i % 7} follows the river {i % 5}, and {i % 9} remain." for i in range(300)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "base.yaml").write_text(yaml.safe_dump({"name": "base", "rules": [RULE]}))
    model = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }
    data = {
        "source": str(folder / "text.txt"),
        "tokenizer": 300,
        "block_size": 32,
        "batch_size": 8,
        "max_val_windows": 10,
        "cache_dir": str(folder / "cache"),
    }
    settings: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "model": {"class_path": "qaware.lm.CausalLM", "init_args": {"model": model, "lr": 1e-2}},
        "data": {"class_path": "qaware.lm.TextDataModule", "init_args": data},
        "trainer": {"max_steps": 30, "accelerator": "cpu", "enable_progress_bar": False},
        "quantize": [{"recipe": str(folder / "base.yaml"), "export": ["tract"]}],
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings))
    return folder


def newest(folder: Path) -> Path:
    return max((folder / "runs" / "tiny").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_sensitivity_then_search_from_its_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tract")
    experiment, out = str(folder / "experiment.yaml"), folder / "out"
    arguments = ["--method", "both", "--windows", "4", "--out", str(out)]
    assert main(["sensitivity", experiment, *arguments]) == 0
    assert "rank correlation" in capsys.readouterr().out
    measured = json.loads((out / "sensitivity.json").read_text(encoding="utf-8"))
    assert len(measured["layers"]) == 8  # seven in the block, and the head; embeddings have no rule
    first = newest(folder)
    float_row = read_rows(first / "results.jsonl")[0]

    checkpoint = str(first / "checkpoints" / "float.ckpt")
    search = ["--budget", "4bpw", "--bits", "3,4", "--method", "estimate", "--windows", "4"]
    recipe = folder / "found.yaml"
    assert main(["search", experiment, *search, "--checkpoint", checkpoint, "--out", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "all 3 bits" in printed
    rows = {(row["model"], row["stage"]): row for row in read_rows(newest(folder) / "results.jsonl")}
    assert list(rows) == [("float", "float"), ("base-4bpw ptq", "converted"), ("base-4bpw ptq", "tract")]
    assert rows["float", "float"]["nats"] == float_row["nats"]
    found = Recipe.load(recipe)
    assert f"{rows['base-4bpw ptq', 'converted']['d_nats']:+.4f}" in found.description
    assert f"{rows['base-4bpw ptq', 'converted']['bytes']} bytes" in found.description
    assert (newest(folder) / "search.png").exists()
    assert (
        json.loads((newest(folder) / "search.json").read_text(encoding="utf-8"))["recipe"]["name"]
        == found.name
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sensitivity", "--method", "fast"], "method: 'fast' is not one of exact, estimate, both"),
        (["sensitivity", "--recipe", "int3"], "recipe: 'int3' is not known"),
        (["sensitivity", "--windows", "1"], "windows: 1 must be 2 or more"),
        (["sensitivity", "--checkpoint", "no.ckpt"], "checkpoint: no.ckpt cannot be read (No such file"),
        (["sensitivity", "--checkpoint", __file__], "test_mixed_run.py does not fit the model"),
        (["sensitivity", "--out", f"{__file__}/folder"], "cannot be written ("),
        (
            ["search", "--budget", "4bpw", "--out", f"{__file__}/a.yaml"],
            "cannot be written (",
        ),
        (["search", "--budget", "4bpw", "--out", "found"], "out: found is read as a recipe's file later"),
        (["search"], "budget"),
        (["search", "--budget", "4.5"], "budget: '4.5' is not one of 4.5bpw"),
        (["search", "--budget", "4bpw", "--bits", "a"], "bits: 'a' must be widths"),
        (["search", "--budget", "4bpw", "--train"], "finetune: is missing"),
        (["search", "quantize=[{recipe: int8-dynamic}]", "--budget", "4bpw"], "names no runtime"),
        (["search", "data.init_args.max_val_windows=0", "--budget", "4bpw"], "windows"),
    ],
)
def test_mistakes_are_one_line_before_the_training(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = set(folder.glob("runs/tiny/*/results.jsonl"))
    command, *more = arguments
    assert main([command, str(folder / "experiment.yaml"), *more]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert set(folder.glob("runs/tiny/*/results.jsonl")) == scored
