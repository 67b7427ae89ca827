from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from qaware.errors import QawareError
from qaware.metrics.classification import score_classification
from qaware.metrics.score import half_width, paired

torch.set_num_threads(1)

INPUTS = [(torch.tensor([[0.5, 0.5], [0.25, 0.75]]),), (torch.tensor([[0.125, 0.875]]),)]
LABELS = [torch.tensor([0, 0]), torch.tensor([1])]


def log(x):
    return x.log()


def test_by_hand():
    score = score_classification(log, INPUTS, LABELS)
    losses = (math.log(2), math.log(4), -math.log(0.875))
    assert score.losses == pytest.approx(losses)
    assert score.nats == pytest.approx(sum(losses) / 3)
    assert score.accuracy == pytest.approx(2 / 3)
    assert (score.count, score.counts) == (3, (1, 1, 1))
    assert (score.hits, score.sqnr) == ((1, 0, 1), None)
    assert score.ci95 == pytest.approx(half_width(losses, (1, 1, 1)))
    assert (score.perplexity, score.bits_per_byte, score.kl, score.top1) == (None, None, None, None)
    assert score.protocol["normalizer"] == "sample"
    assert (score.protocol["samples"], score.protocol["batches"]) == (3, 2)


def test_kl_and_top1_against_a_reference():
    score = score_classification(log, INPUTS, LABELS, lambda x: torch.zeros_like(x))
    half = [0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)) for p in (0.5, 0.25, 0.125)]
    assert score.kl == pytest.approx(sum(half) / 3)
    assert score.top1 == pytest.approx(1 / 3)


def test_sqnr_is_over_the_logits_of_all_batches():
    reference = [torch.tensor([[3.0, 4.0], [0.0, 12.0]]), torch.tensor([[6.0, 8.0]])]
    noise = [torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[0.0, 0.5]])]
    expected = 10 * math.log10((25 + 144 + 100) / 2.25)
    inputs = [(r, n) for r, n in zip(reference, noise, strict=True)]

    def sqnr(predict, base):
        return score_classification(predict, inputs, LABELS, base).sqnr

    assert sqnr(lambda r, n: r - n, lambda r, n: r) == pytest.approx(expected)
    assert sqnr(lambda r, n: r, lambda r, n: r) == math.inf
    assert sqnr(lambda r, n: r, lambda r, n: 0 * r) == -math.inf
    assert score_classification(lambda r, n: r, inputs, LABELS, lambda r, n: r).row()["sqnr"] is None


def test_low_precision_logits_are_scored_in_float64():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(4, dtype=torch.int32)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels.long()).item()
    assert score_classification(lambda x: x, [(logits,)], [labels]).nats == pytest.approx(expected, rel=1e-14)


def test_ranks_extra_and_ticks(monkeypatch):
    calls = []

    class Fake:
        def compute(self, *, predictions, references):
            calls.append((predictions, references))
            return {"accuracy": 1.0}

    monkeypatch.setattr("qaware.metrics.hub.load_metric", lambda name: Fake())
    alone = score_classification(log, INPUTS, LABELS, log, extra=("accuracy",))
    sent, ticks = [], []

    def keep(items):
        sent.extend(items)
        raise StopIteration

    for rank in (1, 0):
        with pytest.raises(StopIteration):
            score_classification(
                log, INPUTS, LABELS, log, extra=("accuracy",), rank=rank, world=2, gather=keep
            )
    together = score_classification(
        log,
        INPUTS,
        LABELS,
        log,
        extra=("accuracy",),
        rank=0,
        world=2,
        gather=lambda _: sent,
        on_batch=lambda: ticks.append(1),
    )
    assert dataclasses.replace(together, seconds=0.0) == dataclasses.replace(alone, seconds=0.0)
    assert calls == [([0, 1, 1], [0, 0, 1])] * 2
    assert ticks == [1]


def test_several_inputs_stay_whole_and_are_copied():
    def add(a, b):
        total = a + b
        a.zero_()
        return total

    x = torch.ones(2, 3)
    score_classification(add, [(x, x.clone())], [torch.tensor([0, 1])])
    assert bool((x == 1).all())


def test_fingerprint_covers_data_labels_and_batching():
    def fingerprint(inputs, labels):
        return score_classification(log, inputs, labels).fingerprint

    x, y = torch.cat([batch[0] for batch in INPUTS]), torch.cat(LABELS)
    base = fingerprint(INPUTS, LABELS)
    assert base == fingerprint(INPUTS, [item.int() for item in LABELS])
    others = [fingerprint([(x,)], [y]), fingerprint([(x * 0.5,)], [y]), fingerprint([(x,)], [1 - y])]
    assert len({base, *others}) == 4
    whole = score_classification(log, [(x,)], [y])
    with pytest.raises(QawareError, match="batches 2 against 1"):
        paired(score_classification(log, INPUTS, LABELS), whole)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        ([], [], "0 for 0 batches"),
        (INPUTS, LABELS[:1], "1 for 2 batches"),
        ([INPUTS[0][0]], LABELS[:1], r"batch 0: inputs are \(2, 2\) float32, need a tuple"),
        (INPUTS, [LABELS[0], torch.tensor([0.0])], r"batch 1: labels are \(1,\) float32"),
        (INPUTS, [LABELS[0], torch.tensor(0)], r"batch 1: labels are \(\) int64"),
        (INPUTS, [LABELS[0], torch.tensor([], dtype=torch.int64)], r"batch 1: labels are \(0,\)"),
        (INPUTS, [LABELS[0], torch.tensor([2])], "batch 1: target 2 has no column among 2 logits"),
        (INPUTS, [torch.tensor([0]), LABELS[1]], r"batch 0: got \(2, 2\) float32, need \(1, V\)"),
    ],
)
def test_refuses(inputs, labels, message):
    with pytest.raises(QawareError, match=message):
        score_classification(log, inputs, labels)


def test_infinite_logits_name_the_batch():
    inputs = [INPUTS[0], (torch.tensor([[0.0, 1.0]]),)]
    with pytest.raises(QawareError, match="batch 1: 1 of 2 float32 logits are NaN or infinite"):
        score_classification(log, inputs, LABELS)
