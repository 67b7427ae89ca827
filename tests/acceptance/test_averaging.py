"""WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging beside quantization."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from qaware import QawareError

from .data import images, sequences
from .models import BuiltInConfigureModel, BuiltInParts, BuiltInSetup, Classifier, LitLM
from .runs import EPOCH_END, STATIC, fake_quantized, make, qat, require_exact_resume, trainer, validate

AVERAGES: list[Any] = [
    pytest.param(lambda: EMAWeightAveraging(decay=0.8), id="ema"),
    pytest.param(lambda: EMAWeightAveraging(decay=0.8, use_buffers=False), id="ema-parameters"),
    pytest.param(WeightAveraging, id="average"),
]
Make = Callable[[], pl.Callback]


def ordered(ours: Any, theirs: Any, first: bool) -> list[Any]:
    return [ours, theirs] if first else [theirs, ours]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("stop", [4, EPOCH_END], ids=["mid-epoch", "epoch-end"])
def test_case_27_resume_with_averaged_weights_is_exact(
    average: Make, first: bool, stop: int, tmp_path: Path
) -> None:
    """ultralytics #26083, aiaccel #554: an average listed before QAT copies a float model, and shapes or keys
    no longer fit. Both models, the average's counter, optimizer and observers, in either order."""
    expected = require_exact_resume(
        LitLM, lambda: ordered(qat(STATIC, start_step=3, convert=False), average(), first), tmp_path, stop
    )
    assert all(torch.isfinite(v).all() for v in expected.state.values() if isinstance(v, torch.Tensor))


class Watched(EMAWeightAveraging):
    """Notes the average when training ends, which is when it is copied into the model."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.trained = copy.deepcopy(pl_module.state_dict())
        self.average = copy.deepcopy(self._average_model.module.state_dict())
        super().on_train_end(trainer, pl_module)


@pytest.mark.parametrize("cls", [LitLM, BuiltInConfigureModel, BuiltInParts])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_27_the_averaged_weights_are_converted(cls: type[LitLM], first: bool) -> None:
    """ultralytics #22198 #26083: what ships is the average, quantized, however late the model is built; and
    the average was itself a quantized model when it was validated."""
    module, callback, ema = make(cls), qat(STATIC), Watched(decay=0.8)
    trainer(*ordered(callback, ema, first)).fit(module, sequences(), sequences(9))
    assert callback.result is not None
    head = "head" if cls is BuiltInParts else "body.head"
    assert fake_quantized(module) == {"body.embed", "body.up", "body.down", head}
    assert set(callback.result.model.weights) == fake_quantized(module)
    for name, weight in callback.result.model.weights.items():
        averaged = ema.average[f"{name}.weight"]
        assert (averaged - weight.dequantize()).abs().max() < averaged.abs().max() / 127, name
        assert not torch.equal(averaged, ema.trained[f"{name}.weight"]), name
    assert validate(callback.result.model.module) == pytest.approx(validate(module), abs=1e-6)


@pytest.mark.parametrize(
    ("average", "cls"),
    [
        (WeightAveraging, BuiltInSetup),
        (lambda: EMAWeightAveraging(decay=0.8), BuiltInSetup),
        (lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1), BuiltInSetup),
        (lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1), BuiltInConfigureModel),
    ],
    ids=["average-setup", "ema-setup", "swa-setup", "swa-configure-model"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_27_an_average_of_nothing_is_refused(average: Make, cls: type[LitLM], first: bool) -> None:
    """These callbacks copy the module in their ``setup``, before its own: of layers that are built later they
    average nothing, in float without a word. With QAT it is one sentence, before training."""
    module = make(cls)
    with pytest.raises(QawareError, match=r"Averaging.*__init__"):
        trainer(*ordered(qat(STATIC), average(), first)).fit(module, sequences(), sequences(9))
    assert module.losses == []


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_27_a_kept_checkpoint_of_the_average_is_what_was_validated(first: bool, tmp_path: Path) -> None:
    """The averaging callback stores the average as the checkpoint's weights; ``best`` must score as it did
    while training, in fresh objects too."""
    module = make()
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    run = trainer(*ordered(qat(STATIC), EMAWeightAveraging(decay=0.5), first), keep)
    run.fit(module, sequences(), sequences(9))
    assert keep.best_model_score is not None
    best = keep.best_model_score.item()
    assert run.validate(module, sequences(9), ckpt_path="best", verbose=False)[0][
        "val_loss"
    ] == pytest.approx(best, abs=1e-7)
    fresh = trainer(qat(STATIC))
    found = fresh.validate(make(seed=5), sequences(9), ckpt_path=keep.best_model_path, verbose=False)
    assert found[0]["val_loss"] == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_27_stochastic_weight_averaging_ships_its_average(first: bool) -> None:
    """StochasticWeightAveraging puts the average into the model when the last epoch ends; the integers are of
    it, and compute what it does."""
    module, callback = make(), qat(STATIC)
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    trainer(*ordered(callback, swa, first), max_epochs=3).fit(module, sequences(), sequences(9))
    assert callback.result is not None
    average = swa._average_model.state_dict()
    for name, weight in callback.result.model.weights.items():
        assert torch.equal(module.get_submodule(name).weight.cpu(), average[f"{name}.weight"]), name
        largest = average[f"{name}.weight"].abs().max()
        assert (average[f"{name}.weight"] - weight.dequantize()).abs().max() < largest / 127, name
    assert validate(callback.result.model.module) == pytest.approx(validate(module), abs=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_27_stochastic_weight_averaging_with_batch_norm(first: bool) -> None:
    """It runs one more epoch, without a backward pass, to count the batch-norm statistics of the average."""
    module, callback = make(Classifier), qat(STATIC, target="net")
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    trainer(*ordered(callback, swa, first), max_epochs=3).fit(module, images(), images(1))
    assert callback.result is not None
    converted = copy.deepcopy(module)
    converted.net = callback.result.model.module
    assert validate(converted, images(1)) == pytest.approx(validate(module, images(1)), abs=1e-6)
