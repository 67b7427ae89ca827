"""Tasks: the inputs that they give are legal, and their scores are those of the metrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.signature import Signature, TensorSpec
from qaware.metrics.windows import Windows
from qaware.tasks import (
    PARITY_INPUTS,
    ClassificationTask,
    LanguageTask,
    UnscoredTask,
    batch_signature,
    language_signature,
    with_bounds,
)

VOCABULARY = 11


def windows(*lengths: int) -> Windows:
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths)
    return Windows(ids, (1,) * len(ids), None, "t", max(lengths), max(lengths), False)


def language(*lengths: int) -> LanguageTask:
    return LanguageTask(windows(*lengths), language_signature("ids", VOCABULARY, max(lengths)))


def uniform(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, VOCABULARY)


@pytest.mark.parametrize("lengths", [(2,), (3, 2), (5, 9, 7), tuple(range(2, 30))])
def test_language_inputs_are_legal(lengths: tuple[int, ...]) -> None:
    task = language(*lengths)
    for inputs in (task.example, *task.parity_inputs):
        task.signature.validate(inputs)
    assert task.example[0].shape == (1, max(lengths))
    assert len(task.parity_inputs) == min(len(lengths), PARITY_INPUTS) + 1
    assert task.steps == len(lengths)


def test_parity_sees_more_than_one_length() -> None:
    assert len({inputs[0].shape[1] for inputs in language(8, 8, 8).parity_inputs}) == 2


def test_a_uniform_model_scores_the_log_of_the_vocabulary() -> None:
    task, calls = language(5, 9), []
    score = task.score(uniform, uniform, on_step=lambda: calls.append(1))
    assert score.nats == pytest.approx(math.log(VOCABULARY))
    assert (score.kl, score.top1, score.count) == (pytest.approx(0), 1.0, 12)
    assert len(calls) == task.steps
    assert task.score(uniform).kl is None


def classification(*sizes: int) -> ClassificationTask:
    inputs = [(torch.randn(n, 3), torch.randint(0, 4, (n, 2))) for n in sizes]
    labels = [torch.zeros(n, dtype=torch.int64) for n in sizes]
    return ClassificationTask(inputs, batch_signature(inputs[0], (None, "ids"), max(sizes)), labels)


@pytest.mark.parametrize("sizes", [(1,), (4, 4, 2), (8,) * 20])
def test_batches_are_legal(sizes: tuple[int, ...]) -> None:
    task = classification(*sizes)
    for inputs in (task.example, *task.parity_inputs):
        task.signature.validate(inputs)
    assert [len(t) for t in task.example] == [min(2, sizes[0])] * 2
    assert [len(i[0]) for i in task.parity_inputs][:2] == [1, sizes[0]]
    assert len(task.parity_inputs) == min(len(sizes), PARITY_INPUTS) + 1


def test_classification_is_scored_in_samples() -> None:
    task = classification(4, 2)
    score = task.score(lambda x, ids: torch.tensor([[2.0, 0.0]]).expand(len(x), 2))
    assert (score.accuracy, score.count) == (1.0, 6)
    assert score.nats == pytest.approx(math.log(1 + math.exp(-2)))


def test_unscored() -> None:
    task = UnscoredTask([(torch.randn(4, 3),)], batch_signature([torch.randn(4, 3)], [None], 4))
    assert task.score(uniform) is None
    assert task.steps == 0
    for inputs in (task.example, *task.parity_inputs):
        task.signature.validate(inputs)


def test_language_signature() -> None:
    signature = language_signature("input_ids", 512, 64, "input_ids")
    assert signature.inputs == (TensorSpec("input_ids", "int64", (1, "seq"), 0, 511, "input_ids"),)
    assert signature.symbols == {"seq": (1, 64)}
    assert language_signature("x", None, 64).inputs[0].low is None


def test_batch_signature_names_inputs_and_shares_the_axis() -> None:
    signature = batch_signature([torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)], [None, "mask"], 1)
    assert [(s.name, s.dtype, s.shape, s.keyword) for s in signature.inputs] == [
        ("input0", "float32", ("batch", 3), None),
        ("mask", "int64", ("batch",), "mask"),
    ]
    assert signature.symbols == {"batch": (1, 2)}
    with pytest.raises(QawareError, match="mask: shape is"):
        signature.validate([torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64)])


def test_with_bounds_fills_in_what_is_known() -> None:
    signature = batch_signature([torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.int64)], [None, None], 4)
    bounded = with_bounds(signature, [None, (0, 0)])
    assert [(s.low, s.high) for s in bounded.inputs] == [(None, None), (0, 0)]
    with pytest.raises(QawareError, match="input1: value 1 is outside 0 to 0"):
        bounded.validate([torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.int64)])
    assert isinstance(bounded, Signature)
    assert bounded.symbols == signature.symbols
