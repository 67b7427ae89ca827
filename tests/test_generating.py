"""Text from an artifact: pieces, the tokenizer beside it, and what stands in the way. The runtimes' own tests
are in tests/exporters; here the artifact is a runner that needs none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qaware.generating as generating
from qaware.cli import main
from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.files import sha256
from qaware.generating import Generated, generate
from qaware.lm import tokens
from qaware.tasks import language_signature

TEXT = "the naïve cat 🙂 sat on the mat and the naïve cat 🙂 sat down"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """So small that 🙂 takes several tokens."""
    return tokens.train_tokenizer([TEXT], 290)


class Parrot:
    """A runner that says a text, whatever was asked: token n of it at place n."""

    length, most = 64, 8

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        self.ids, self.vocabulary = ids, vocabulary

    def step(self, input_ids: Tensor, start: int) -> Tensor:
        following = [self.ids[(start + i + 1) % len(self.ids)] for i in range(input_ids.shape[1])]
        return torch.nn.functional.one_hot(torch.tensor([following]), self.vocabulary).float()

    def __enter__(self) -> Parrot:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def artifact(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "lm.pte"
    path.write_bytes(b"program")
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    signature = language_signature("input_ids", len(tokenizer), 8)
    about = {"tokenizer": "tokenizer", "data": {"bos": False}}
    Artifact(path, "executorch", signature, {}, {}, sha256(path), 7, metadata=about).save()
    ids = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    monkeypatch.setattr(generating, "IsolatedRunner", lambda artifact: Parrot(ids, len(tokenizer)))
    return path


def test_text_comes_in_whole_characters_and_ends_where_the_text_ends(artifact: Path, tokenizer: Any) -> None:
    pieces: list[str] = []
    found = generate(artifact, "the", 60, on_text=pieces.append)
    assert "the" + found.text == TEXT == "the" + "".join(pieces)
    assert "�" not in "".join(pieces)
    assert found.tokens[-1] == tokenizer.eos_token_id
    assert len(found.tokens) > len(pieces), "some characters take several tokens"
    assert found.prompt_tokens == len(tokenizer.encode("the", add_special_tokens=False))


def test_it_stops_where_the_cache_is_full(artifact: Path) -> None:
    prompt = TEXT[:20]
    found = generate(artifact, prompt, 10_000)
    assert found.prompt_tokens + len(found.tokens) <= 65


def test_the_command_prints_the_text_and_how_fast_it_was(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(artifact), "--prompt", "the", "--max-new-tokens", "60"]) == 0
    out, err = capsys.readouterr()
    assert out == TEXT + "\n"
    assert "tokens read and the first made in" in err


def test_an_empty_prompt_needs_a_bos_token(artifact: Path) -> None:
    with pytest.raises(QawareError, match="prompt: is empty"):
        generate(artifact, "")
    sidecar = artifact.with_name("lm.pte.json")
    about = json.loads(sidecar.read_text())
    about["metadata"]["data"]["bos"] = True
    sidecar.write_text(json.dumps(about))
    assert generate(artifact, "", 3).prompt_tokens == 1


def test_a_prompt_that_a_shell_gave_in_other_bytes_is_refused(artifact: Path) -> None:
    with pytest.raises(QawareError, match="prompt: is no text in UTF-8"):
        generate(artifact, "caf\udce9")


def test_without_a_tokenizer_it_says_how_to_get_one(artifact: Path) -> None:
    found = Artifact.open(artifact)
    found.update(metadata={})
    with pytest.raises(QawareError, match="no tokenizer beside it; export from an experiment"):
        generate(artifact, "the")


def test_speed_counts_the_tokens_after_the_first() -> None:
    found = Generated("p", "t", [1, 2, 3], 4, first_seconds=0.5, seconds=1.5)
    assert found.tokens_per_second == 2
    assert dataclasses.replace(found, tokens=[1]).tokens_per_second == 0
