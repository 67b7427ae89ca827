"""Parity: the figures by hand, what is refused, and outputs of every shape."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qaware.engines.base import ActivationRange
from qaware.errors import ParityError
from qaware.exporters.base import Tolerance
from qaware.parity import Parity, compare

TOLERANCE = Tolerance(relative=1e-2, kl=1e-3, reason="test")


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def identity(x: Tensor) -> Tensor:
    return x


def test_by_hand() -> None:
    reference = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    runner = torch.tensor([[0.5, 1.0], [0.0, 0.0]])
    parity = compare(lambda _: runner, Apply(lambda _: reference), [(reference,)])
    p = [math.e / (1 + math.e), 1 / (1 + math.e)]
    q = [math.exp(0.5) / (1 + math.exp(0.5)), 1 / (1 + math.exp(0.5))]
    first = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    e2 = math.exp(2) / (1 + math.exp(2))
    second = e2 * math.log(e2 / 0.5) + (1 - e2) * math.log((1 - e2) / 0.5)
    assert parity.relative == pytest.approx((0.5 + 2) / 4 / reference.std().item())
    assert parity.max_abs == 2
    assert parity.kl == pytest.approx((first + second) / 2)
    assert parity.top1 == 1.0
    assert parity.inputs == 1


def test_the_kl_has_a_direction() -> None:
    a, b = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    forward = compare(lambda _: b, Apply(lambda _: a), [(a,)]).kl
    backward = compare(lambda _: a, Apply(lambda _: b), [(a,)]).kl
    assert forward == pytest.approx(
        float((a.softmax(-1) * (a.log_softmax(-1) + math.log(3))).sum()), rel=1e-5
    )
    assert abs(forward - backward) > 0.1


def test_every_row_of_every_input_weighs_the_same() -> None:
    inputs = [(torch.tensor([[1.0, 0.0]]),), (torch.tensor([[0.0, 1.0]] * 3),)]
    parity = compare(lambda x: x.flip(-1) if len(x) == 1 else x, Apply(identity), inputs)
    assert parity.top1 == 0.75
    assert parity.inputs == 2


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 7, 16), (1, 3, 16)],
        [(1, 5), (4, 5)],
        [(1,), (4,)],
        [(1, 3), (1, 7)],
        [(), ()],
        [(2, 3, 4, 5)],
    ],
)
def test_outputs_of_every_shape(shapes: list[tuple[int, ...]]) -> None:
    inputs = [
        (torch.randn(shape, generator=torch.Generator().manual_seed(i)),) for i, shape in enumerate(shapes)
    ]
    same = compare(identity, Apply(identity), inputs)
    assert (same.relative, same.max_abs, same.kl, same.top1) == (0, 0, 0, 1)
    same.require("x", TOLERANCE)
    off = compare(lambda x: x + 1, Apply(identity), inputs)
    assert off.relative > 0.1
    assert off.max_abs == pytest.approx(1)


def test_low_precision_outputs_are_compared_in_float64() -> None:
    x = torch.randn(3, 9).bfloat16()
    assert compare(lambda x: x.float(), Apply(identity), [(x,)]).relative == 0


def test_another_shape_is_a_parity_error() -> None:
    with pytest.raises(ParityError, match=r"output: shape is \(2, 3\), the model gives \(3, 2\)"):
        compare(lambda x: x.T, Apply(identity), [(torch.zeros(3, 2),)])


def test_nan_never_holds() -> None:
    x = torch.randn(2, 3)
    parity = compare(lambda x: x * math.nan, Apply(identity), [(x,)])
    assert not parity.within(TOLERANCE)
    assert not parity.within(Tolerance(math.inf, math.inf, ""))


@pytest.mark.parametrize(
    ("relative", "kl", "good"), [(1e-2, 1e-3, True), (1.1e-2, 0, False), (0, 1.1e-3, False)]
)
def test_both_figures_must_hold(relative: float, kl: float, good: bool) -> None:
    parity = Parity(relative, 99.0, kl, 0.0, 1)
    assert parity.within(TOLERANCE) is good
    if not good:
        with pytest.raises(ParityError) as caught:
            parity.require("model.pte", TOLERANCE)
        for words in ("model.pte", f"{relative:.2e}", f"{kl:.2e}", "1e-02", "1e-03", ".rejected"):
            assert words in str(caught.value)


def test_a_constant_output_divides_by_no_zero() -> None:
    x = torch.ones(3, 2)
    assert compare(identity, Apply(identity), [(x,)]).relative == 0
    assert not compare(lambda x: x + 1e-3, Apply(identity), [(x,)]).within(TOLERANCE)


def test_nothing_is_recorded_for_gradients() -> None:
    layer = nn.Linear(4, 2)
    compare(layer, layer, [(torch.randn(3, 4),)])
    assert all(p.grad is None for p in layer.parameters())


def test_plain_data() -> None:
    parity = Parity(0.1, 0.2, 0.3, 0.4, 5)
    assert json.loads(json.dumps(parity.to_dict())) == {
        "relative": 0.1,
        "max_abs": 0.2,
        "kl": 0.3,
        "top1": 0.4,
        "inputs": 5,
        "steps": None,
        "differing": None,
        "far": None,
        "level": "default",
        "beyond": None,
    }


GRID = ActivationRange(0.1, 3)


def on_grid(integers: list[float]) -> Tensor:
    return (torch.tensor([integers]) - GRID.zero_point) * GRID.scale


def test_steps_of_an_output_that_is_on_a_grid() -> None:
    expected = on_grid([-128, 127, 5, 3])
    grids = [ActivationRange(0.07, 0), GRID, ActivationRange(0.05, 0)]
    same = compare(lambda _: expected + 1e-6, Apply(identity), [(expected,)], grids)
    assert (same.steps, same.differing) == (0, 0)
    off = compare(lambda _: on_grid([-128, 126, 5, 5]), Apply(identity), [(expected,)], grids)
    assert (off.steps, off.differing) == (2, 0.5)


@pytest.mark.parametrize(
    "expected", [on_grid([1, 2, 3.4]), on_grid([1, 2, 128]), torch.zeros(1, 3), torch.full((1, 3), math.nan)]
)
def test_an_output_that_is_on_no_grid_has_no_steps(expected: Tensor) -> None:
    parity = compare(identity, Apply(identity), [(expected,)], [GRID])
    assert parity.steps is parity.differing is None
    assert compare(identity, Apply(identity), [(on_grid([1, 2]),)]).steps is None


@pytest.mark.parametrize(
    ("steps", "far", "good"),
    [(1, 0.0, True), (2, 0.011, False), (2, 0.009, True), (math.nan, 1.0, False), (None, None, True)],
)
def test_steps_are_held_to_the_tolerance(steps: float | None, far: float | None, good: bool) -> None:
    parity = Parity(0.0, 0.0, 0.0, 1.0, 1, steps, None if steps is None else 0.25, far)
    tolerance = Tolerance(1e-2, 1e-3, "rounding", steps=1)
    assert parity.within(tolerance) is good
    assert parity.within(TOLERANCE)
    if not good:
        words = r"25\.00% of the values differ, [0-9.]+% by more than one step, at most 1% allowed; relative"
        with pytest.raises(ParityError, match=words):
            parity.require("model.pte", tolerance)


def test_how_many_are_far_off_is_counted() -> None:
    expected = on_grid([1, 2, 3, 4])
    parity = compare(
        lambda x: x + torch.tensor([0, 1, 2, 0]) * GRID.scale, Apply(identity), [(expected,)], [GRID]
    )
    assert (parity.steps, parity.differing, parity.far) == (2, 0.5, 0.25)


def test_nan_is_a_difference_in_steps_too() -> None:
    expected = on_grid([1, 2])
    parity = compare(lambda x: x * math.nan, Apply(identity), [(expected,)], [GRID])
    assert parity.differing == 1
    assert not parity.within(Tolerance(math.inf, math.inf, "", steps=9))
