"""The tokenizer's files in a folder: those and no others, and the ids that a runtime asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qaware.exporters import get_exporter
from qaware.exporters.tokenizer_files import special_ids
from qaware.lm.tokens import train_tokenizer
from qaware.recipe import Recipe


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the cat sat on the mat"], 280)


@pytest.fixture
def exporter(tmp_path: Path) -> Any:
    made: Any = get_exporter("mlx")
    made.tokenizer = tmp_path / "tokenizer"
    (tmp_path / "folder").mkdir()
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_files_of_a_tokenizer_are_copied(exporter: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name in ("config.json", "model.safetensors", "model.onnx", "README.md"):
        (tmp_path / "tokenizer" / name).write_text("not ours")
    (tmp_path / "tokenizer" / "tokenizer_folder").mkdir()
    assert exporter.copy_tokenizer(folder)
    assert names(folder) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("files", [None, [], ["tokenizer_config.json"]], ids=str)
def test_a_folder_without_vocabulary_is_none(exporter: Any, tmp_path: Path, files: list[str] | None) -> None:
    for name in files or []:
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / name).write_text("{}")
    assert not exporter.copy_tokenizer(tmp_path / "folder")


def test_ids_of_special_tokens(tokenizer: Any, tmp_path: Path) -> None:
    assert special_ids(tmp_path) == {}
    tokenizer.save_pretrained(tmp_path)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    assert special_ids(tmp_path) == ends
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {
        "eos_token": {"content": config["bos_token"]},
        "pad_token": config["eos_token"],
        "bos_token": None,
    }
    path.write_text(json.dumps(config))
    assert special_ids(tmp_path) == {
        "eos_token_id": ends["bos_token_id"],
        "pad_token_id": ends["eos_token_id"],
    }


@pytest.mark.parametrize("runtime", ["gguf", "mlx", "onnxruntime-genai"])
def test_a_model_without_embedding_is_refused_before_it_is_trained(runtime: str) -> None:
    recipe, chosen = Recipe.load("int8-dynamic"), get_exporter(runtime)
    why = chosen.refuse_plan(recipe.match(nn.Sequential(nn.Linear(64, 32))))
    assert why is not None
    assert why.startswith(f"{runtime}: is for language models")
    assert chosen.refuse_plan(recipe.match(nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 32)))) is None
