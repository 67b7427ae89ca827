"""The command line: what a user mistypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qaware.cli import main


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n".join(f"{i} and {i % 7} make {i + i % 7}." for i in range(300)))
    model = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    data = {"source": str(tmp_path / "text.txt"), "tokenizer": 300, "block_size": 16}
    settings: dict[str, Any] = {
        "name": "tiny",
        "output": str(tmp_path / "runs"),
        "model": {"class_path": "qaware.lm.CausalLM", "init_args": {"model": model}},
        "data": {"class_path": "qaware.lm.TextDataModule", "init_args": data},
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "quantize": [{"recipe": "int8-static"}],
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("trainer.max_epoch=8", "max_epoch"),
        ("nam=8", "nam"),
        ("data.init_args.block_sise=8", "block_sise"),
        ("model.init_args.model.hiden_size=8", "hiden_size"),
        ("model.init_arg.lr=0.1", "init_arg"),
        ("finetune.max_step=4", "max_step"),
        ("quantize+={recipe: int8-static, method: [qat]}", "method"),
        ("quantize+={recipe: int8-statik}", "int8-static"),
        ("trainer.max_steps=many", "max_steps"),
        ("quantize+={recipe: {rules: [{type: Linear, scheme: {bitz: 8}}]}}", "bitz"),
    ],
)
def test_case_42_a_typo_is_one_line_and_exit_code_2(
    mistake: str, named: str, experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured: argparse's abbreviations took ``trainer.max_epoch=8`` and ``nam=8`` without a word. One line
    that names the key, exit code 2, and nothing was trained or scored."""
    assert main(["run", str(experiment), mistake]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("qaware: error: ")
    assert named in lines[0]
    assert not [f for f in experiment.parent.rglob("*") if f.name == "results.jsonl" or f.suffix == ".ckpt"]


def test_case_42_without_the_typo_it_runs(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that the cases above are about the typo."""
    assert main(["run", str(experiment), "trainer.max_steps=1", "name=other"]) == 0
    assert (experiment.parent / "runs" / "other").is_dir()
    assert "int8-static ptq" in capsys.readouterr().out.replace("\n", " ")
