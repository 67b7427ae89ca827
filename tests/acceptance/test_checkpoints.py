"""Checkpoints of a QAT run: tested, loaded elsewhere, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

import qaware
from qaware import QawareError

from .data import sequences
from .models import BuiltInConfigureModel, LitLM
from .runs import INT4, STATIC, fake_quantized, make, qat, trainer, validate

BODY = {"body.embed", "body.up", "body.down", "body.head"}


def trained(folder: Path, recipe: str = STATIC, cls: Any = LitLM, **options: Any) -> LitLM:
    """A prepared module whose last state is ``last.ckpt``."""
    module = make(cls)
    keep = ModelCheckpoint(dirpath=folder, save_last=True, **options)
    trainer(qat(recipe, convert=False), keep).fit(module, sequences(), sequences(9))
    return module


@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_04_every_ckpt_path_works_after_a_fit(recipe: str, tmp_path: Path) -> None:
    """Lightning #12896: the module was converted in place, and its own checkpoints fitted no more. ``best``,
    ``last``, a path and None give what was trained; ``best`` is as good as when it was kept."""
    module = make()
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    run = trainer(EarlyStopping("val_loss"), qat(recipe), keep, max_epochs=3)
    run.fit(module, sequences(), sequences(9))
    after = validate(module)
    tested = [
        run.test(module, sequences(9), ckpt_path=path, verbose=False)[0]["test_loss"]
        for path in (None, "last", str(tmp_path / "last.ckpt"))
    ]
    assert tested == [after] * 3
    best = run.test(module, sequences(9), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert keep.best_model_score is not None
    assert best == pytest.approx(keep.best_model_score.item(), abs=1e-7)
    assert fake_quantized(module) == BODY


@pytest.mark.parametrize("cls", [LitLM, BuiltInConfigureModel])
@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_05_a_prepared_checkpoint_is_never_read_as_float(
    cls: type[LitLM], recipe: str, tmp_path: Path
) -> None:
    """Measured with torchao: a prepared checkpoint in a float module gave float numbers, without a word. With
    the callback or ``qaware.load_from_checkpoint`` it computes what was trained; without, it raises."""
    module = trained(tmp_path, recipe, cls)
    expected, last = validate(module), tmp_path / "last.ckpt"
    run = trainer(qat(recipe))
    assert run.validate(make(cls, 5), sequences(9), ckpt_path=last, verbose=False)[0]["val_loss"] == expected
    if cls is LitLM:  # Lightning's own loading knows no module that is built later
        loaded = qaware.load_from_checkpoint(cls, last)
        assert type(loaded) is cls
        assert fake_quantized(loaded) == BODY
        assert validate(loaded) == expected
        with pytest.raises(RuntimeError, match="Unexpected key"):
            cls.load_from_checkpoint(last)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_fake_quantizer"):
        trainer().validate(make(cls, 5), sequences(9), ckpt_path=last, verbose=False)


def test_case_05_what_was_loaded_converts_and_trains_on(tmp_path: Path) -> None:
    """Integers from a checkpoint, without a Trainer; and the loaded module is a module to train."""
    module = trained(tmp_path)
    loaded = qaware.load_from_checkpoint(LitLM, tmp_path / "last.ckpt")
    ours, theirs = qaware.convert(loaded), qaware.convert(module)
    assert set(ours.weights) == BODY
    assert all(w.data.equal(theirs.weights[n].data) for n, w in ours.weights.items())
    assert ours.activations == theirs.activations
    assert validate(ours.module) == validate(module)
    trainer(qat(STATIC), max_epochs=1).fit(loaded, sequences(), sequences(9))
    assert loaded.losses[-1] < module.losses[0]


@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_35_a_float_checkpoint_begins_a_run(recipe: str, tmp_path: Path) -> None:
    """pytorch #29032: a float checkpoint in a prepared model failed, or loaded nothing. Strictly loaded,
    every weight is the checkpoint's, and training goes on from its step."""
    plain = make()
    trainer(ModelCheckpoint(dirpath=tmp_path, save_last=True), max_epochs=1).fit(
        plain, sequences(), sequences(9)
    )
    seen: list[dict[str, torch.Tensor]] = []

    class Look(LitLM):
        def on_train_start(self) -> None:
            seen.append({n: p.detach().clone() for n, p in self.named_parameters()})

    module, callback = make(Look, 5), qat(recipe)
    run = trainer(callback)
    run.fit(module, sequences(), sequences(9), ckpt_path=tmp_path / "last.ckpt")
    assert all(value.equal(seen[0][name]) for name, value in plain.named_parameters())
    assert len(module.losses) == 6
    assert run.global_step == 12
    assert callback.result is not None
    assert validate(callback.result.model.module) == validate(module)


@pytest.mark.parametrize("order", [0, 1], ids=["first", "last"])
def test_case_36_weights_only_checkpoints_keep_the_mark(order: int, tmp_path: Path) -> None:
    """Measured: ``save_weights_only=True`` skips every callback's hook, and the mark was lost. A fresh run of
    ``test`` and ``load_from_checkpoint`` still know what it is, in both orders of the callbacks."""
    module = make()
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_weights_only=True)
    callbacks = [qat(STATIC), keep]
    trainer(*(callbacks[::-1] if order else callbacks)).fit(module, sequences(), sequences(9))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "optimizer_states" not in saved
    assert saved["qaware"]["phase"] == "prepared"
    found = trainer(qat(STATIC)).test(
        make(seed=5), sequences(9), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert found[0]["test_loss"] == validate(module)
    assert validate(qaware.load_from_checkpoint(LitLM, tmp_path / "last.ckpt")) == validate(module)


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights-only"])
def test_case_36_a_checkpoint_saved_by_hand_after_the_fit(weights_only: bool, tmp_path: Path) -> None:
    """``trainer.save_checkpoint`` is most often called when fit is over, and the mark must be there too."""
    module = make()
    run = trainer(qat(STATIC))
    run.fit(module, sequences(), sequences(9))
    path = tmp_path / "mine.ckpt"
    run.save_checkpoint(path, weights_only=weights_only)
    assert validate(qaware.load_from_checkpoint(LitLM, path)) == validate(module)
    found = trainer(qat(STATIC)).validate(make(seed=5), sequences(9), ckpt_path=path, verbose=False)
    assert found[0]["val_loss"] == validate(module)


def test_a_checkpoint_from_before_start_step_is_what_it_was(tmp_path: Path) -> None:
    """Its forward pass did not round, and does not when it is validated elsewhere."""
    module = make()
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run = trainer(qat(STATIC, convert=False, start_step=1000), keep)
    run.fit(module, sequences(), sequences(9))
    expected = run.validate(module, sequences(9), verbose=False)
    fresh = trainer(qat(STATIC, start_step=1000))
    path = tmp_path / "last.ckpt"
    assert fresh.validate(make(seed=5), sequences(9), ckpt_path=path, verbose=False) == expected
    plain = make(seed=5)
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if n in plain.state_dict()})
    assert validate(plain) == expected[0]["val_loss"]


def test_a_checkpoint_under_another_recipe_is_refused(tmp_path: Path) -> None:
    """One sentence names both recipes and the two ways out, whatever the checkpoint is used for."""
    trained(tmp_path, INT4)
    path = tmp_path / "last.ckpt"
    message = r"'int8-dynamic-int4-weight'.*'int8-static'.*give that recipe, or start from a float"
    module = make()
    with pytest.raises(QawareError, match=message):
        trainer(qat(STATIC)).fit(module, sequences(), sequences(9), ckpt_path=path)
    assert module.losses == []
    with pytest.raises(QawareError, match=message):
        trainer(qat(STATIC)).validate(make(), sequences(9), ckpt_path=path, verbose=False)
    with pytest.raises(QawareError, match="target"):
        trainer(qat(INT4, target="body")).fit(make(), sequences(), sequences(9), ckpt_path=path)
    trainer(qat(INT4)).fit(make(), sequences(), sequences(9), ckpt_path=path)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_the_checkpoint_of_an_exception_resumes(first: bool, tmp_path: Path) -> None:
    """OnExceptionCheckpoint saves while the exception passes through the callbacks, some of which are
    done."""

    class Breaks(LitLM):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if len(self.losses) == 4:
                raise ValueError("the disk is full")

    keep, ours = OnExceptionCheckpoint(tmp_path), qat(STATIC)
    with pytest.raises(ValueError, match="the disk is full"):
        trainer(*([ours, keep] if first else [keep, ours])).fit(make(Breaks), sequences(), sequences(9))
    path = tmp_path / "on_exception.ckpt"
    assert torch.load(path, weights_only=True)["qaware"]["phase"] == "prepared"
    module, callback = make(seed=5), qat(STATIC)
    trainer(callback).fit(module, sequences(), sequences(9), ckpt_path=path)
    assert len(module.losses) == 8
    assert callback.result is not None
