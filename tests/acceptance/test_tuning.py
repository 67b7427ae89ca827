"""LearningRateFinder and BatchSizeFinder train on trial and put everything back."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from qaware.callbacks.hooks import NAMES
from qaware.observers import observers

from .data import Resumable, sequences
from .models import LitLM
from .runs import INT4, STATIC, fake_quantized, make, qat, trainer, validate

SHORT = {"num_training": 30, "min_lr": 1e-4, "max_lr": 1e-1}
BODY = {"body.embed", "body.up", "body.down", "body.head"}


class Sized(LitLM):
    """Its loaders follow ``batch_size``."""

    def train_dataloader(self) -> Resumable:
        return sequences(batch_size=self.batch_size)

    def val_dataloader(self) -> Resumable:
        return sequences(9, batch_size=self.batch_size)


def many() -> Resumable:
    """30 batches, as many as the search takes."""
    return sequences(count=240)


def require_complete(module: LitLM, callback: Any, losses: int) -> None:
    """The fit that follows a search is like one without."""
    assert len(module.losses) == losses
    assert fake_quantized(module) == BODY
    assert not set(NAMES) & set(module.__dict__)
    assert callback.result is not None
    assert validate(callback.result.model.module) == validate(module)


def state(module: LitLM) -> dict[str, Any]:
    return {n: v.detach().clone() for n, v in module.state_dict().items()}


@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_37_tuner_lr_find(recipe: str) -> None:
    """Measured: a search left overrides on the module. It finds a rate, and puts weights and ranges back: the
    training after it is that of a run which was given this rate."""
    module, callback = make(), qat(recipe, start_step=3)
    run = trainer(callback, enable_checkpointing=True)
    start = state(module)
    found = Tuner(run).lr_find(module, many(), sequences(9), **SHORT)
    assert found is not None
    assert not set(NAMES) & set(module.__dict__)
    assert callback.result is None, "a search is no fit"
    assert all(value.equal(start[name]) for name, value in module.state_dict().items() if name in start)
    assert not any(observer.seen for observer in observers(module))
    assert module.lr == found.suggestion()
    module.losses.clear()
    run.fit(module, many(), sequences(9))
    require_complete(module, callback, 60)
    given = make()
    given.lr = module.lr
    trainer(qat(recipe, start_step=3)).fit(given, many(), sequences(9))
    assert module.losses == given.losses


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_37_learning_rate_finder(first: bool) -> None:
    """The callback searches inside the fit. What comes after is as if it had not; in both orders."""
    module, callback = make(), qat(STATIC, start_step=3)
    finder = LearningRateFinder(num_training_steps=30, min_lr=1e-4, max_lr=1e-1)
    callbacks = [callback, finder] if first else [finder, callback]
    trainer(*callbacks, enable_checkpointing=True).fit(module, many(), sequences(9))
    assert 10 < len(module.losses) - 60 <= 30, "what was searched"
    module.losses = module.losses[-60:]
    require_complete(module, callback, 60)
    given, again = make(), qat(STATIC, start_step=3)
    given.lr = finder.optimal_lr.suggestion()
    trainer(again).fit(given, many(), sequences(9))
    assert module.losses == given.losses
    assert again.result is not None
    assert callback.result.model.activations == again.result.model.activations


def test_case_37_tuner_scale_batch_size() -> None:
    """The batch-size search of a Tuner: the size it finds, the weights and ranges of before."""
    module, callback = make(Sized), qat(STATIC)
    run = trainer(callback, enable_checkpointing=True)
    start = state(module)
    found = Tuner(run).scale_batch_size(module, mode="power", init_val=4, max_trials=3, steps_per_trial=2)
    assert found == module.batch_size == 16
    assert all(value.equal(start[name]) for name, value in module.state_dict().items() if name in start)
    assert not any(observer.seen for observer in observers(module))
    assert callback.result is None
    module.losses.clear()
    run.fit(module)
    require_complete(module, callback, 6)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_37_batch_size_finder(first: bool) -> None:
    """The same inside a fit, in both orders: nothing of the trial is in the ranges that ship."""
    module, callback = make(Sized), qat(STATIC)
    finder = BatchSizeFinder(mode="power", init_val=4, max_trials=3, steps_per_trial=2)
    callbacks = [callback, finder] if first else [finder, callback]
    trainer(*callbacks, enable_checkpointing=True).fit(module)
    assert module.batch_size == 16
    module.losses = module.losses[-6:]
    require_complete(module, callback, 6)
    given, again = make(Sized), qat(STATIC)
    given.batch_size = 16
    trainer(again).fit(given)
    assert module.losses == given.losses
    assert again.result is not None
    assert callback.result.model.activations == again.result.model.activations


def test_case_37_batch_size_finder_of_an_evaluation() -> None:
    """BatchSizeFinder also works in ``validate``; a prepared module is evaluated as it was trained."""
    module = make(Sized)
    trainer(qat(STATIC)).fit(module)
    expected = validate(module, module.val_dataloader())
    finder = BatchSizeFinder(mode="power", init_val=4, max_trials=2, steps_per_trial=2)
    run = trainer(qat(STATIC), finder)
    found = run.validate(module, verbose=False)[0]["val_loss"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert fake_quantized(module) == BODY
