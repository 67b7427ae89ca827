"""Fit again, reuse, validate before and after, stop early, fail: a Trainer's whole life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelSummary

from qaware import QawareError
from qaware.callbacks.hooks import NAMES

from .data import images, sequences
from .models import BuiltInConfigureModel, BuiltInSetup, Checkpointed, Classifier, LitLM
from .runs import INT4, STATIC, different, fake_quantized, integers, make, outcome, qat, trainer, validate

OURS = {*NAMES, "forward"}


def clean(module: pl.LightningModule) -> bool:
    """Whether nothing of the callback but the mark is left on the module."""
    named = {key for key in module.__dict__ if key.startswith(("qaware", "_qaware"))}
    return not OURS & set(module.__dict__) and named <= {"qaware_state"}


@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_06_without_conversion_and_fitted_twice(recipe: str) -> None:
    """Lightning #8464: conversion is optional, and a module that was fitted can be fitted again, with the
    same Trainer and with another."""
    module, callback = make(), qat(recipe, convert=False)
    run = trainer(callback)
    run.fit(module, sequences(), sequences(9))
    assert callback.result is None
    run.fit_loop.max_epochs = 3
    run.fit(module, sequences(), sequences(9))
    assert len(module.losses) == 18
    more = qat(recipe)
    trainer(more, max_epochs=1).fit(module, sequences(), sequences(9))
    assert more.result is not None
    assert validate(more.result.model.module) == validate(module)
    assert module.losses[-1] < module.losses[11] < module.losses[0]
    assert clean(module)


def test_case_06_a_converted_module_is_not_trained() -> None:
    """Lightning #8464: training integers is refused in one sentence that says what to train instead."""
    callback = qat(STATIC)
    trainer(callback).fit(make(), sequences(), sequences(9))
    assert callback.result is not None
    converted = callback.result.model.module
    before = validate(converted)
    with pytest.raises(QawareError, match=r"LitLM: is converted.*use the module that was given"):
        trainer(qat(STATIC)).fit(converted, sequences(), sequences(9))
    assert clean(converted)
    assert validate(converted) == before


def test_case_17_one_callback_two_models_and_two_trainers() -> None:
    """Lightning 1.9 kept "prepared" on the callback. One callback for two models in turn, and one model in
    two Trainers: each is prepared once, and the result is of the last fit."""
    callback, results = qat(STATIC), []
    modules = [make(seed=1), make(BuiltInConfigureModel, seed=2)]
    for module in modules:
        trainer(callback).fit(module, sequences(), sequences(9))
        assert callback.result is not None
        results.append(callback.result)
        assert validate(callback.result.model.module) == validate(module)
    assert results[0] is not results[1]
    trainer(callback, max_epochs=1).fit(modules[0], sequences(), sequences(9))
    assert validate(callback.result.model.module) == validate(modules[0])
    assert [len(m.losses) for m in modules] == [18, 12]
    assert all(clean(m) for m in modules)


def test_case_17_another_recipe_for_a_prepared_module_is_refused() -> None:
    """A module that was prepared in one way is not prepared in another on top."""
    module = make()
    trainer(qat(STATIC)).fit(module, sequences(), sequences(9))
    with pytest.raises(QawareError, match=r"'int8-static'.*'int8-dynamic-int4-weight'"):
        trainer(qat(INT4)).fit(module, sequences(), sequences(9))
    assert len(module.losses) == 12


@pytest.mark.parametrize("cls", [LitLM, BuiltInSetup, BuiltInConfigureModel])
def test_validate_test_predict_before_and_after_fit(cls: type[LitLM]) -> None:
    """An evaluation does not prepare a float module, and evaluates a prepared one as it was trained."""
    module, callback = make(cls), qat(STATIC)
    run = trainer(callback)
    for _ in range(2):
        before = run.validate(module, sequences(9), verbose=False)
        assert run.test(module, sequences(9), verbose=False)[0]["test_loss"] == before[0]["val_loss"]
        assert len(run.predict(module, sequences(9))) == 6
    assert fake_quantized(module) == set()
    run.fit(module, sequences(), sequences(9))
    after = run.validate(module, sequences(9), verbose=False)
    assert run.test(module, sequences(9), verbose=False)[0]["test_loss"] == after[0]["val_loss"]
    assert after[0]["val_loss"] == validate(module) == validate(callback.result.model.module)
    assert torch.cat(run.predict(module, sequences(9))).shape == (48, 8)
    assert clean(module)


def test_case_37_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    """Measured: dry runs left overrides behind. One batch, no files, and a fit afterwards like a first
    one."""
    module = make()
    callback = qat(STATIC, output_dir=tmp_path / "out", score=True)
    trainer(callback, fast_dev_run=True).fit(module, sequences(), sequences(9))
    assert len(module.losses) == 1
    assert clean(module)
    assert callback.result is not None
    trainer(qat(STATIC)).fit(module, sequences(), sequences(9))
    assert len(module.losses) == 13


@pytest.mark.parametrize("where", ["on_train_start", "training_step", "validation_step", "on_fit_end"])
def test_case_37_an_exception_leaves_nothing(where: str) -> None:
    """Measured: Lightning skips a callback's teardown after an exception. The module is as clean as after a
    fit, and can be fitted."""

    class Fails(LitLM):
        broken = True

    def fail(self: Fails, *args: Any) -> Any:
        if self.broken:
            raise KeyError("column")
        return getattr(LitLM, where)(self, *args)

    setattr(Fails, where, fail)
    module = make(Fails)
    with pytest.raises(KeyError):
        trainer(qat(STATIC)).fit(module, sequences(), sequences(9))
    assert clean(module)
    module.broken = False
    module.losses.clear()
    callback = qat(STATIC)
    trainer(callback).fit(module, sequences(), sequences(9))
    assert len(module.losses) == 12
    assert callback.result is not None
    assert validate(callback.result.model.module) == validate(module)


def test_overfit_batches() -> None:
    """Validation runs on the training data; both come through the same loader options."""
    module, callback = make(), qat(STATIC, score=True)
    trainer(callback, overfit_batches=2, max_epochs=4).fit(module, sequences(), sequences(9))
    assert len(module.losses) == 8
    assert module.losses[-1] < module.losses[0]
    assert callback.result is not None
    scores = callback.result.scores
    assert scores["converted"].losses == scores["prepared"].losses


def test_early_stopping_ends_in_a_conversion() -> None:
    """A run that stops itself is as complete as one that ran to its end."""
    module, callback = make(), qat(STATIC)
    stop = EarlyStopping("val_loss", patience=0, stopping_threshold=100.0)
    run = trainer(callback, stop, max_epochs=50)
    run.fit(module, sequences(), sequences(9))
    assert run.current_epoch < 50
    assert callback.result is not None
    assert validate(callback.result.model.module) == validate(module)


def test_frozen_and_thawed_backbones() -> None:
    """BackboneFinetuning freezes in its own setup and thaws later: frozen layers are quantized all the same,
    and the thawed ones train."""

    class Finetuned(Classifier):
        def __init__(self) -> None:
            super().__init__(norm=False)
            self.backbone = self.net[:2]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module, callback = make(Finetuned), qat(STATIC, target="net")
    start = module.net[0].weight.detach().clone()
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer(callback, thaw, ModelSummary(), max_epochs=1).fit(module, images(), images(1))
    assert module.net[0].weight.equal(start)
    assert callback.result is not None
    assert integers(callback.result.model.module) == {"0.weight", "2.weight", "4.weight"}
    module, again = make(Finetuned), qat(STATIC, target="net")
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer(again, thaw, max_epochs=2).fit(module, images(), images(1))
    assert not module.net[0].weight.equal(start)


def test_case_28_gradient_checkpointing_observes_once(tmp_path: Path) -> None:
    """Measured: the recomputation of the backward pass was observed again. Losses, ranges and weights are
    those of a run without, for both kinds of checkpointing."""
    runs = []
    for reentrant in (None, False, True):
        module = make(Checkpointed)
        module.reentrant = reentrant
        run = trainer(qat(STATIC, start_step=3, convert=False))
        run.fit(module, sequences(), sequences(9))
        runs.append(outcome(run, module, tmp_path))
    for other in runs[1:]:
        assert other.losses == runs[0].losses
        assert different(other, runs[0]) == []
