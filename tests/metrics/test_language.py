from __future__ import annotations

import dataclasses
import datetime
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qaware.errors import QawareError, RuntimeDiedError
from qaware.metrics import nats
from qaware.metrics.language import score_language
from qaware.metrics.score import paired
from qaware.metrics.windows import Windows

torch.set_num_threads(1)
VOCAB = 13


def bigram(seed: int, dtype: torch.dtype = torch.float32):
    """A model whose logits for the next token are a table's row of the current one."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return lambda ids: table[ids]


def random_windows(count: int, seed: int = 0) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(VOCAB, (9 + i % 4,), generator=generator) for i in range(count))
    first = tuple(1 + i % 3 for i in range(count))
    return Windows(ids, first, 1000, "toy", 12, 12, False)


def exactly(score):
    """A score without its clock."""
    return dataclasses.replace(score, seconds=0.0)


def probabilities(*rows):
    """A model that gives these next-token probabilities whatever the tokens."""
    return lambda ids: torch.tensor(rows).log().unsqueeze(0)


HAND = Windows((torch.tensor([0, 1, 0]),), (1,), 4, "toy", 3, 3, False)


def test_by_hand():
    predict = probabilities((0.5, 0.5), (0.25, 0.75), (0.9, 0.1))  # p(1) = 1/2, then p(0) = 1/4; last unused
    score = score_language(predict, HAND)
    assert score.losses == (pytest.approx(math.log(8), rel=1e-7),)
    assert score.nats == pytest.approx(math.log(8) / 2, rel=1e-7)
    assert score.perplexity == pytest.approx(math.sqrt(8), rel=1e-7)
    assert score.bits_per_byte == pytest.approx(3 / 4, rel=1e-7)
    assert (score.count, score.counts, score.ci95) == (2, (2,), None)
    assert (score.kl, score.top1, score.accuracy, score.extra) == (None, None, None, {})
    assert score.fingerprint == HAND.fingerprint
    assert score.protocol == HAND.protocol()
    assert score.seconds > 0


def test_kl_and_top1_by_hand():
    mine = probabilities((0.5, 0.5), (0.25, 0.75), (0.9, 0.1))
    reference = probabilities((0.5, 0.5), (0.5, 0.5), (0.1, 0.9))
    score = score_language(mine, HAND, reference)
    # KL(half, half || quarter, three quarters) = ln 2 - ln 3 / 2, over two tokens
    assert score.kl == pytest.approx((math.log(2) - math.log(3) / 2) / 2, rel=1e-6)
    assert score.top1 == 0.5  # ties count as token 0, so the second row disagrees


def test_a_model_against_itself():
    score = score_language(bigram(0), random_windows(5), bigram(0))
    assert (score.kl, score.top1) == (0.0, 1.0)


def test_only_tokens_from_first_on_are_scored():
    predict = probabilities((0.5, 0.5), (0.25, 0.75), (0.9, 0.1))
    score = score_language(predict, dataclasses.replace(HAND, first=(2,)))
    assert (score.count, score.nats) == (1, pytest.approx(math.log(4), rel=1e-6))


def test_agrees_with_cross_entropy_and_weighs_by_tokens():
    windows, model = random_windows(20), bigram(3)
    logits = torch.cat([model(i)[f - 1 : -1] for i, f in zip(windows.ids, windows.first, strict=True)])
    targets = torch.cat([i[f:] for i, f in zip(windows.ids, windows.first, strict=True)])
    score = score_language(lambda ids: model(ids), windows)
    expected = torch.nn.functional.cross_entropy(logits.double(), targets).item()
    assert score.nats == pytest.approx(expected, rel=1e-14)
    assert score.count == len(targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float64(dtype):
    windows = random_windows(8)
    low, same = bigram(1, dtype), bigram(1, dtype)
    assert score_language(low, windows).nats == score_language(lambda ids: same(ids).double(), windows).nats
    target = 5.0
    rounded = torch.log_softmax(torch.full((1, 1000), target, dtype=dtype), -1)
    assert abs(nats.log_probs(torch.full((1, 1000), target, dtype=dtype))[0, 0] + math.log(1000)) < 1e-12
    assert abs(rounded[0, 0].double() + math.log(1000)) > 1e-4


def test_chunks_do_not_change_a_bit(monkeypatch):
    windows = random_windows(6)
    whole = score_language(bigram(1), windows, bigram(2))
    monkeypatch.setattr(nats, "_CHUNK", 3 * VOCAB)
    assert exactly(score_language(bigram(1), windows, bigram(2))) == exactly(whole)


def test_no_gradients_and_inputs_are_copies():
    table = torch.nn.Parameter(torch.zeros(VOCAB, VOCAB))

    def scribble(ids):
        assert not torch.is_grad_enabled()
        logits = table[ids]
        ids.zero_()
        return logits

    windows = random_windows(3)
    score_language(scribble, windows, scribble)
    assert windows.fingerprint == random_windows(3).fingerprint


def test_overflow_gives_infinite_perplexity_not_an_exception():
    score = score_language(lambda ids: torch.tensor([[[1e5, 0.0]] * 3]), HAND)
    assert score.nats == 5e4
    assert score.perplexity == math.inf


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda ids: torch.zeros(1, 2, 5), r"window 0: got \(1, 2, 5\) float32, need \(1, 3, V\) float"),
        (lambda ids: torch.zeros(3, 5), r"got \(3, 5\) float32"),
        (lambda ids: torch.zeros(1, 3, 5, dtype=torch.int64), "int64, need"),
        (lambda ids: (torch.zeros(1, 3, 5),), "window 0: got tuple"),
        (lambda ids: torch.full((1, 3, 5), math.nan), "window 0: 15 of 15 float32 logits are NaN"),
        (
            lambda ids: torch.tensor([[[0.0, -math.inf]] * 3]),
            "window 0: 3 of 6 float32 logits are NaN or inf",
        ),
        (lambda ids: torch.zeros(1, 3, 1), "window 0: target 1 has no column among 1 logits"),
    ],
)
def test_logits_that_cannot_be_scored(predict, message):
    with pytest.raises(QawareError, match=message):
        score_language(predict, HAND)


def test_negative_ids_are_named():
    windows = Windows((torch.tensor([0, -100]),), (1,), None, "toy", 2, 2, False)
    with pytest.raises(QawareError, match="target -100 has no column"):
        score_language(lambda ids: torch.zeros(1, 2, 3), windows)


def test_reference_of_another_vocabulary():
    with pytest.raises(QawareError, match="window 0: the model has 5 logits and the reference 6"):
        score_language(lambda ids: torch.zeros(1, 3, 5), HAND, lambda ids: torch.zeros(1, 3, 6))
    with pytest.raises(QawareError, match="window 0, reference: got"):
        score_language(lambda ids: torch.zeros(1, 3, 5), HAND, lambda ids: torch.zeros(3, 6))


def test_on_window_and_extra(monkeypatch):
    calls = []

    class Fake:
        def compute(self, *, predictions, references):
            calls.append((predictions, references))
            return {"exact": 0.25, "note": "text"}

    monkeypatch.setattr("qaware.metrics.hub.load_metric", lambda name: Fake())
    ticks = []
    predict = probabilities((0.1, 0.9), (0.25, 0.75), (0.9, 0.1))
    score = score_language(predict, HAND, on_window=lambda: ticks.append(1), extra=("some/exact.py",))
    assert calls == [([1, 1], [1, 0])]
    assert score.extra == {"exact": 0.25}
    assert ticks == [1]


def test_a_bad_extra_fails_before_the_model_runs():
    def never(ids):
        raise AssertionError("the model ran")

    with pytest.raises(QawareError, match="'perplexity' is measured already"):
        score_language(never, HAND, extra=("perplexity",))


# --- several ranks


def ranks(world: int, windows: Windows, *, repeat: bool = False, **options):
    """Score on each rank in turn, twice: to collect what each gathers, then to hand everybody all of it."""
    sent: list = []

    def keep(items):
        sent.extend(pickle.loads(pickle.dumps(items)))
        raise StopIteration

    for rank in range(world):
        with pytest.raises(StopIteration):
            score_language(bigram(1), windows, bigram(2), rank=rank, world=world, gather=keep, **options)
    everyone = sent + sent[:3] if repeat else sent
    return [
        score_language(
            bigram(1), windows, bigram(2), rank=rank, world=world, gather=lambda _: everyone, **options
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("world", [2, 3, 70])
def test_any_number_of_ranks_gives_the_same_bits(world, repeat):
    windows = random_windows(61)
    alone = exactly(score_language(bigram(1), windows, bigram(2)))
    for score in ranks(world, windows, repeat=repeat)[:4]:
        assert exactly(score) == alone


def test_missing_records_and_nested_lists_are_refused():
    with pytest.raises(QawareError, match="2 of 4 records are missing, the first is 1"):
        score_language(bigram(1), random_windows(4), rank=0, world=2, gather=lambda mine: mine)
    with pytest.raises(QawareError, match="one flat list"):
        score_language(bigram(1), random_windows(4), rank=0, world=2, gather=lambda mine: [mine])


@pytest.mark.parametrize(
    ("rank", "world", "message"), [(0, 2, "world: 2 ranks need"), (2, 2, "rank: 2"), (0, 0, "rank: 0")]
)
def test_ranks_that_cannot_be(rank, world, message):
    with pytest.raises(QawareError, match=message):
        score_language(bigram(1), random_windows(4), rank=rank, world=world)


def _worker(rank: int, folder: str) -> None:
    """A rank of a real process group: one score, then a window that fails on rank 1 only."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),
    )
    windows = random_windows(61)
    score = score_language(bigram(1), windows, bigram(2), rank=rank, world=2)

    def dies(ids):
        if rank == 1:
            raise RuntimeDiedError("the runtime died")
        return bigram(1)(ids)

    try:
        score_language(dies, windows, rank=rank, world=2)
    except QawareError as error:
        torch.save((dataclasses.asdict(score), type(error).__name__, str(error)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_same_bits_and_fail_together(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    alone = score_language(bigram(1), random_windows(61), bigram(2))
    (zero, kind0, text0), (one, kind1, text1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert zero == one
    assert zero | {"seconds": 0} == dataclasses.asdict(alone) | {"seconds": 0}
    assert (kind0, text0) == ("QawareError", "rank 1: RuntimeDiedError: the runtime died")
    assert (kind1, text1) == ("RuntimeDiedError", "the runtime died")


def test_two_models_pair_up():
    windows = random_windows(61)
    a, b = score_language(bigram(1), windows), score_language(bigram(2), windows)
    difference, width = paired(a, b)
    assert difference == pytest.approx(a.nats - b.nats, abs=1e-12)
    assert 0 < width < 1


class Elsewhere:
    """A model as a runner is one: a window is started before the one before it was asked for, and logits are
    measured while the next window runs."""

    def __init__(self, predict, broken=None, refused=None):
        self.predict, self.broken, self.refused = predict, broken, refused
        self.started = self.asked = 0
        self.most = 0

    def submit(self, ids):
        index, self.started = self.started, self.started + 1
        self.most = max(self.most, self.started - self.asked)
        if index == self.refused:
            raise QawareError(f"input {index} is refused")

        def get():
            self.asked += 1
            logits = self.predict(ids)
            return logits * float("nan") if index == self.broken else logits

        return SimpleNamespace(get=get, seconds=2.0)


def test_a_runner_gets_the_same_score_and_the_same_error():
    text, seen, predict = random_windows(6), [], bigram(0)
    runner = Elsewhere(predict)
    found = score_language(runner, text, on_window=lambda: seen.append(1))
    assert exactly(found) == exactly(score_language(predict, text))
    assert (len(seen), runner.asked, runner.most) == (6, 6, 2)
    assert found.seconds == 12
    for refused in (0, 1, 5):
        with pytest.raises(QawareError, match=f"input {refused} is refused"):
            score_language(Elsewhere(predict, refused=refused), text)
    with pytest.raises(QawareError, match=r"window 2: .* are NaN"):  # the first that fails
        score_language(Elsewhere(predict, broken=2, refused=3), text)
    for broken in (0, 3, 5):
        with pytest.raises(QawareError, match=f"window {broken}: .* are NaN"):
            score_language(Elsewhere(predict, broken), text)
