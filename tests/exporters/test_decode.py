"""Greedy and drawn tokens, from runners with and without a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.decode import decode, in_steps

VOCABULARY = 11


class Fake:
    """Logits that depend on the sum of all ids so far, and on nothing that it was not given."""

    def __init__(self, length: int, most: int) -> None:
        self.length, self.most = length, most
        self.held: list[int] = []
        self.calls: list[tuple[int, int]] = []

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.step(tensors[0], 0)

    def step(self, input_ids: Tensor, start: int) -> Tensor:
        self.calls.append((start, input_ids.shape[1]))
        assert len(self.held) >= start
        self.held = self.held[:start] + input_ids[0].tolist()
        sums = torch.tensor(self.held).cumsum(0)[start:]
        return -(torch.arange(VOCABULARY) - (sums[:, None] * 7) % VOCABULARY).abs().float()[None]


PROMPT = torch.tensor([[1, 2, 3, 4, 5]])


def test_a_cache_is_read_in_parts_and_gives_the_tokens_of_whole_texts() -> None:
    cached, whole = Fake(length=20, most=2), Fake(length=0, most=20)
    found = list(decode(cached, PROMPT, 6))
    assert found == list(decode(whole, PROMPT, 6))
    assert cached.calls == [(0, 2), (2, 2), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1)]
    assert whole.calls == [(0, n) for n in range(5, 11)]


@pytest.mark.parametrize("length", [1, 2, 5, 9, 20])
def test_steps_together_are_the_whole_text(length: int) -> None:
    ids, runner = torch.arange(length)[None], Fake(length=20, most=20)
    assert torch.equal(in_steps(runner, 3)(ids), Fake(20, 20)(ids))
    sizes = [count for _, count in runner.calls]
    assert sum(sizes) == length
    assert sizes[1:4] == [1] * min(3, length - max(1, length // 2))


def test_a_stop_token_is_the_last() -> None:
    tokens = list(decode(Fake(20, 20), PROMPT, 6))
    stop = tokens[2]
    assert list(decode(Fake(20, 20), PROMPT, 6, stop=(stop,))) == tokens[: tokens.index(stop) + 1]


def test_draws_follow_the_seed_and_stay_among_the_likeliest() -> None:
    def draw(seed: int, top_k: int = 0) -> list[int]:
        return list(decode(Fake(60, 20), PROMPT, 40, temperature=5.0, top_k=top_k, seed=seed))

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_k=1) == list(decode(Fake(60, 20), PROMPT, 40))
    assert draw(3, top_k=2) != draw(3)


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_coldest_draw_is_the_likeliest_token(top_k: int) -> None:
    cold = list(decode(Fake(60, 20), PROMPT, 20, temperature=1e-320, top_k=top_k))
    assert cold == list(decode(Fake(60, 20), PROMPT, 20))


def test_the_last_token_needs_no_place_in_the_cache() -> None:
    assert len(list(decode(Fake(7, 7), PROMPT, 3))) == 3
    with pytest.raises(QawareError, match=r"8 to read, and its cache holds 7.*larger cache_length"):
        list(decode(Fake(7, 7), PROMPT, 4))
    with pytest.raises(QawareError, match=r"it takes 7.*block_size"):
        list(decode(Fake(0, 7), PROMPT, 4))


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, r"input_ids: shape is \(1, 0\)"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, r"input_ids: shape is \(2, 3\)"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens: 0 must be at least 1"),
        (PROMPT, {"temperature": -1.0}, "temperature: -1.0"),
        (PROMPT, {"temperature": float("nan")}, "temperature: nan must be at least 0"),
        (PROMPT, {"top_k": -2}, "top_k: -2"),
        (PROMPT, {"seed": 2**64}, "seed: 18446744073709551616 must be a number of 64 bits"),
    ],
)
def test_bad_options_are_refused(ids: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(QawareError, match=message):
        list(decode(Fake(20, 20), ids, **{"max_new_tokens": 2, **options}))
