"""torch.compile: switching the rounding on in the middle of a run, and converting what was compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .data import sequences
from .runs import INT4, STATIC, fake_quantized, integers, make, qat, trainer, validate

BACKEND = "aot_eager"  # traces, and splits forward from backward, without minutes of a C++ compiler


@pytest.fixture(autouse=True)
def forget() -> Any:
    """What one test compiled is no help to the next, and counts against its limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(module: Any) -> None:
    module.compile(backend=BACKEND)


def part(module: Any) -> None:
    module.body.compile(backend=BACKEND)


@pytest.mark.parametrize("compiled", [whole, part], ids=["module", "body"])
@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_29_rounding_begins_inside_a_compiled_run(recipe: str, compiled: Callable[[Any], None]) -> None:
    """Measured: a compiled graph may keep the switch that it was traced with. Losses are those of a run
    without compilation before and after ``start_step`` and ``freeze_observers_step``; keys stay; the copy
    converts."""
    runs = []
    for compile_it in (lambda module: None, compiled):
        module, callback = make(), qat(recipe, start_step=4, freeze_observers_step=9)
        keys = set(module.state_dict())
        compile_it(module)
        trainer(callback).fit(module, sequences(), sequences(9))
        assert keys <= set(module.state_dict())
        assert not [key for key in module.state_dict() if "_orig_mod" in key]
        assert callback.result is not None
        runs.append((module, callback.result))
    (plain, expected), (module, result) = runs
    assert module.losses == pytest.approx(plain.losses, abs=1e-4)
    assert fake_quantized(module) == fake_quantized(plain)
    assert integers(result.model.module) == integers(expected.model.module)
    for name, activation in expected.model.activations.items():
        assert result.model.activations[name].scale == pytest.approx(activation.scale, rel=1e-3)
    assert validate(result.model.module) == pytest.approx(validate(module), abs=1e-5)


def test_case_29_a_float_run_is_not_the_same() -> None:
    """So that the case above can fail: rounding changes these losses by more than its tolerance."""
    losses = []
    for start in (4, 100):
        module = make()
        trainer(qat(STATIC, start_step=start, convert=False)).fit(module, sequences(), sequences(9))
        losses.append(module.losses)
    assert losses[0][:4] == losses[1][:4]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) > 1e-3
