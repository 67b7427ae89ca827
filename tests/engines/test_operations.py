from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.operations import (
    Operation,
    add_operation,
    add_scope,
    note_rectified,
    operations,
    remove_scope,
    unwatched,
)
from qaware.layout import OperationSite


class Tenfold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 10


class Adds(nn.Module):
    """Two additions and a concatenation; the inner module adds too."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1.0  # no addition of two tensors
        y = self.inner(y + x)
        y += x
        return torch.cat([y, x])


X = torch.tensor([1.0, 2.0])


def test_only_the_named_call_is_changed() -> None:
    plain = Adds()(X)
    for kind, index, expected in (
        ("add", 0, torch.cat([10 * (2 * X + 1) + X, X])),
        ("add", 1, torch.cat([10 * (3 * X + 1), X])),
        ("cat", 0, 10 * plain),
    ):
        model = Adds()
        add_operation(model, OperationSite("", kind, index), Tenfold())
        torch.testing.assert_close(model(X), expected)
        torch.testing.assert_close(model(X), expected)  # calls are counted anew


def test_the_calls_of_a_module_inside_are_its_own() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    model = Adds(Doubles())
    add_operation(model, OperationSite("", "add", 1), Tenfold())
    add_operation(model.inner, OperationSite("inner", "add", 0), Tenfold())
    torch.testing.assert_close(model(X), torch.cat([10 * (20 * (2 * X + 1) + X), X]))
    assert isinstance(operations(model.inner)["add_0"], Operation)


def test_a_scope_without_operations_counts_apart() -> None:
    class Leaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = Leaf()

        def forward(self, x: Tensor) -> Tensor:
            return self.leaf(x) + x

    model = Outer()
    add_scope(model.leaf)
    add_operation(model, OperationSite("", "add", 0), Tenfold())
    torch.testing.assert_close(model(X), 30 * X)


def test_an_engines_own_functions_are_not_counted() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with unwatched():
                return x + x

    model = Adds(Own())
    add_operation(model, OperationSite("", "add", 1), Tenfold())
    torch.testing.assert_close(model(X), torch.cat([10 * (2 * (2 * X + 1) + X), X]))


def test_a_relu_comes_before_the_rounding() -> None:
    model = Adds()
    add_operation(model, OperationSite("", "cat", 0, relu=True), Tenfold())
    assert float(model(-X - 1).max()) == 0


class Rectifies(nn.Module):
    """A ReLU that was fused to what comes before it, in the ways that a model has for it."""

    relu: Any = F.relu

    def forward(self, x: Tensor) -> Tensor:
        return type(self).relu(note_rectified(x * 1))


@pytest.mark.parametrize(
    "relu", [F.relu, torch.relu, torch.relu_, Tensor.relu, nn.ReLU(), nn.ReLU(inplace=True)]
)
def test_a_second_relu_is_left_out(relu: Any) -> None:
    model = Rectifies()
    Rectifies.relu = staticmethod(relu)
    x = torch.tensor([0.0, 2.0], requires_grad=True)
    model(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0]
    x.grad = None
    add_scope(model)
    assert torch.equal(model(x), x)
    model(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


class Subtracts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = note_rectified(x * 1)
        y -= 1
        return torch.relu(y)


def test_a_relu_after_something_else_stays() -> None:
    model = Subtracts()
    add_scope(model)
    assert model(torch.tensor([0.5, 3.0])).tolist() == [0.0, 2.0]
    with torch.inference_mode():
        assert model(torch.tensor([0.5, 3.0])).tolist() == [0.0, 2.0]


def test_names_copies_and_pickles() -> None:
    model = Adds()
    add_operation(model, OperationSite("", "add", 0), Tenfold())
    assert type(model).__name__ == "Adds"
    assert isinstance(model, Adds)
    assert "qaware_operations.add_0" in dict(model.named_modules())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other is not model
        torch.testing.assert_close(other(X), model(X))
    remove_scope(model)
    assert type(model) is Adds
    torch.testing.assert_close(model(X), Adds()(X))


def test_an_error_inside_ends_the_watch() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    model = Adds(Fails())
    add_operation(model, OperationSite("", "add", 0), Tenfold())
    with pytest.raises(RuntimeError):
        model(X)
    torch.testing.assert_close(X + X, 2 * X)
    model.inner = nn.Identity()
    torch.testing.assert_close(model(X), torch.cat([10 * (2 * X + 1) + X, X]))
