"""Signature: every illegal input is named before a runtime sees it; outputs of every form are understood."""

from __future__ import annotations

import json
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qaware.errors import QawareError
from qaware.exporters.signature import Signature, TensorSpec, first_tensor, value_range

IDS = TensorSpec("ids", "int64", (1, "seq"), 0, 9)
MASK = TensorSpec("mask", "float32", (1, "seq", 3), keyword="mask")
SIGNATURE = Signature((IDS, MASK), {"seq": (2, 6)})


def ids(length: int = 4, value: int = 9) -> Tensor:
    return torch.full((1, length), value)


def test_legal_inputs() -> None:
    for length in (2, 6):
        SIGNATURE.validate((ids(length), torch.zeros(1, length, 3)))
    SIGNATURE.validate([ids(3, 0), torch.zeros(1, 3, 3)])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((ids(),), "inputs: got 1, the model takes 2 (ids, mask)"),
        ((), "inputs: got 0, the model takes 2 (ids, mask)"),
        ((ids().int(), torch.zeros(1, 4, 3)), "ids: dtype is torch.int32, must be torch.int64"),
        ((ids(), torch.zeros(1, 4, 3).half()), "mask: dtype is torch.float16, must be torch.float32"),
        ((ids()[0], torch.zeros(1, 4, 3)), "ids: shape is (4,), must be (1, 'seq')"),
        ((ids().repeat(2, 1), torch.zeros(1, 4, 3)), "ids: shape is (2, 4), must be (1, 'seq')"),
        ((ids(1), torch.zeros(1, 1, 3)), "ids: seq is 1, must be 2 to 6"),
        ((ids(7), torch.zeros(1, 7, 3)), "ids: seq is 7, must be 2 to 6"),
        ((ids(4), torch.zeros(1, 5, 3)), "mask: shape is (1, 5, 3), must be (1, 'seq', 3)"),
        ((ids(4), torch.zeros(1, 4, 2)), "mask: shape is (1, 4, 2), must be (1, 'seq', 3)"),
        ((ids(4, 10), torch.zeros(1, 4, 3)), "ids: value 10 is outside 0 to 9"),
        ((ids(4, -1), torch.zeros(1, 4, 3)), "ids: value -1 is outside 0 to 9"),
    ],
)
def test_an_illegal_input_is_named(tensors: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(QawareError) as caught:
        SIGNATURE.validate(tensors)
    assert str(caught.value) == message


def test_one_bad_value_among_good_ones_is_found() -> None:
    tensor = ids(5, 3)
    tensor[0, 4] = 99
    with pytest.raises(QawareError, match="value 99"):
        SIGNATURE.validate((tensor, torch.zeros(1, 5, 3)))


def test_an_empty_axis_has_no_values_to_check() -> None:
    Signature((IDS,), {"seq": (0, 6)}).validate((ids(0),))


def test_plain_data_round_trips_through_json() -> None:
    again = Signature.from_dict(json.loads(json.dumps(SIGNATURE.to_dict())))
    assert again == SIGNATURE


class Keywords(nn.Module):
    def forward(self, ids: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        return {"loss": torch.zeros(()), "logits": ids.unsqueeze(-1) * mask}


def test_wrapped_a_model_takes_positions_and_returns_a_tensor() -> None:
    wrapped = SIGNATURE.wrap(Keywords())
    assert torch.equal(wrapped(ids(), torch.ones(1, 4, 3)), torch.full((1, 4, 3), 9.0))
    with pytest.raises(ValueError, match="argument"):
        wrapped(ids())


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2),
        {"loss": torch.zeros(1), "logits": torch.ones(2)},
        OrderedDict(out=torch.ones(2), other=torch.zeros(1)),
        SimpleNamespace(loss=None, logits=torch.ones(2)),
        (torch.ones(2), torch.zeros(1)),
        [None, "text", torch.ones(2)],
    ],
)
def test_the_tensor_of_an_output(output: object) -> None:
    assert torch.equal(first_tensor(output), torch.ones(2))


@pytest.mark.parametrize("output", [None, 3, {}, (), {"logits": None}, "text", SimpleNamespace(logits=None)])
def test_an_output_without_a_tensor_is_refused(output: object) -> None:
    with pytest.raises(
        QawareError, match=f"forward: returned {type(output).__name__}, which holds no tensor"
    ):
        first_tensor(output)


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.small = nn.Embedding(7, 2), nn.Embedding(50, 2), nn.Embedding(5, 2)

    def forward(self, ids: Tensor, other: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.small(other)


def test_legal_values_are_the_rows_of_the_embedding() -> None:
    model, a, b, c = Embeds(), torch.tensor([[1, 3]]), torch.tensor([[2, 2]]), torch.tensor([[0, 0]])
    assert value_range(model, lambda: model(a, b), a) == (0, 6)
    assert value_range(model, lambda: model(a, b), b) == (0, 4)
    assert value_range(model, lambda: model(a, b), c) is None
    assert value_range(model, lambda: model(a, a), a) == (0, 4)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = Embeds()
    with pytest.raises(IndexError):
        value_range(
            model, lambda: model(torch.tensor([[99, 1]]), torch.tensor([[0, 0]])), torch.tensor([[99, 1]])
        )
    assert not any(m._forward_pre_hooks for m in model.modules())
