"""Text from an exported language model on its own runtime, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.decode import decode
from qaware.exporters.isolated import IsolatedRunner


@dataclass(frozen=True)
class Generated:
    """What came of a prompt."""

    prompt: str
    text: str
    """What follows the prompt."""
    tokens: list[int]
    """Ids of the new tokens, the end of text among them."""
    prompt_tokens: int
    first_seconds: float
    """Wall time to the first new token: reading the prompt."""
    seconds: float
    """Wall time of all."""

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; 0 when there is only one."""
        rest = self.seconds - self.first_seconds
        return (len(self.tokens) - 1) / rest if len(self.tokens) > 1 and rest > 0 else 0.0

    @property
    def summary(self) -> str:
        """One line: how many tokens in which time."""
        speed = f", then {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else ""
        count, first = len(self.tokens), self.first_seconds
        return f"{self.prompt_tokens} tokens read and the first made in {first:.3f} s{speed} ({count} new)"


def generate(
    path: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Generated:
    """Continue ``prompt`` with an artifact that was exported with a tokenizer beside it.

    Args:
        path: of the artifact.
        prompt: text; where it is empty, the tokenizer must have a BOS token.
        max_new_tokens: fewer come where the text ends (the tokenizer's EOS) or the cache is full.
        temperature: 0 for the likeliest token each time; else logits are divided by it before a draw.
        top_k: draw from so many likeliest tokens only; 0 for all.
        seed: of the draws.
        on_text: called with each new piece of text as soon as its characters are whole.

    Raises:
        QawareError: damaged artifact, no tokenizer, a prompt that does not fit, or an option out of range.
    """
    artifact = Artifact.open(Path(path))
    tokenizer = _tokenizer(artifact)
    ids, end = _encode(tokenizer, prompt, artifact), tokenizer.eos_token_id
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "seed": seed}
    with IsolatedRunner(artifact) as runner:
        count = _fitting(runner, ids, max_new_tokens)
        started, first, pieces, tokens = time.perf_counter(), 0.0, _Pieces(tokenizer, ids, on_text), []
        for token in decode(runner, ids, count, stop=() if end is None else (end,), **options):
            first = first or time.perf_counter() - started
            tokens.append(token)
            pieces.add(token)
        seconds = time.perf_counter() - started
    return Generated(prompt, pieces.finish(), tokens, ids.shape[1], first, seconds)


class _Pieces:
    """New text out of tokens, each of which may hold only a part of a character."""

    def __init__(self, tokenizer: Any, prompt: Tensor, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids = prompt[0].tolist()
        self.before, self.said = self._decode(), ""

    def add(self, token: int) -> None:
        """Say what is new, but for a character that is not whole yet."""
        self.ids.append(token)
        text = self._new()
        if not text.endswith("�"):
            self._say(text)

    def finish(self) -> str:
        """All new text."""
        self._say(self._new())
        return self.said

    def _new(self) -> str:
        # Decoded together with the prompt: some tokenizers drop the space in front of a first word.
        return self._decode()[len(self.before) :]

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _say(self, text: str) -> None:
        if len(text) > len(self.said):
            self.on_text(text[len(self.said) :])
            self.said = text


def _tokenizer(artifact: Artifact) -> Any:
    from qaware.lm.tokens import load_tokenizer

    folder = artifact.metadata.get("tokenizer")
    if folder is None or not (artifact.path.parent / folder).is_dir():
        raise QawareError(
            f"{artifact.path}: has no tokenizer beside it; export from an experiment or a Trainer whose data "
            "is a TextDataModule"
        )
    return load_tokenizer(str(artifact.path.parent / folder))


def _encode(tokenizer: Any, prompt: str, artifact: Artifact) -> Tensor:
    """As the documents of the training data: BOS in front where they have one."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise QawareError(f"prompt: is no text in UTF-8 ({error.reason}); give it in that") from error
    first = [tokenizer.bos_token_id] if artifact.metadata.get("data", {}).get("bos", True) else []
    ids = [i for i in first if i is not None] + tokenizer.encode(prompt, add_special_tokens=False)
    if not ids:
        raise QawareError(
            "prompt: is empty, and the tokenizer has no BOS token to start from; give some text"
        )
    return torch.tensor([ids])


def _fitting(runner: IsolatedRunner, ids: Tensor, count: int) -> int:
    """As many tokens as fit; a prompt that leaves no room is refused by ``decode``."""
    room = (runner.length or runner.most) - ids.shape[1] + 1
    return min(count, room) if room > 0 else count
