"""prepare, convert and load_from_checkpoint, outside a Trainer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lit import LitLM, loader, trainer
from torch import nn
from torchao.quantization.qat import FakeQuantizedLinear

import qaware
from qaware import QawareError, QuantizationAwareTraining, Recipe

RECIPE = "int8-dynamic-int4-weight"


class Sized(LitLM):
    """Has hyperparameters, its layers in ``configure_model``, and a load hook of its own."""

    def __init__(self, width: int, extra: bool = False) -> None:
        super().__init__(lazy=True)
        self.save_hyperparameters()
        self.loaded: list[str] = []
        self.norm = nn.LayerNorm(width)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded.append(checkpoint["qaware"]["recipe"]["name"] if "qaware" in checkpoint else "float")


def fit(model: LitLM, folder: Path, **options: Any) -> Path:
    """One epoch of QAT; the checkpoint."""
    keep = ModelCheckpoint(dirpath=folder, save_last=True)
    qat = QuantizationAwareTraining(RECIPE, convert=False, **options)
    run = trainer(callbacks=[qat, keep], enable_checkpointing=True, max_epochs=1)
    run.fit(model, loader(), loader(9))
    return folder / "last.ckpt"


def loss(model: LitLM) -> float:
    return trainer().validate(model, loader(9), verbose=False)[0]["val_loss"]


def test_a_prepared_module_is_the_same_object_and_trains(tmp_path: Path) -> None:
    model = LitLM()
    up = model.body.up
    assert qaware.prepare(model, RECIPE) is model
    assert model.body.up is up
    assert type(up) is FakeQuantizedLinear
    qaware.prepare(model, Recipe.load(RECIPE))  # once more changes nothing
    fit(model, tmp_path)
    assert len(model.losses) == 4


def test_a_module_without_layers_is_prepared_when_it_is_built() -> None:
    model = qaware.prepare(LitLM(lazy=True), RECIPE)
    model.configure_model()
    assert type(model.body.up) is FakeQuantizedLinear


def test_another_recipe_or_target_is_refused() -> None:
    model = qaware.prepare(LitLM(), RECIPE, target="body")
    with pytest.raises(QawareError, match="module: was prepared under recipe 'int8-dynamic-int4-weight'"):
        qaware.prepare(model, "int8-dynamic", target="body")
    with pytest.raises(QawareError, match="with target 'body', now it is None"):
        trainer(callbacks=[QuantizationAwareTraining(RECIPE)]).fit(model, loader())


def test_convert_gives_what_the_forward_pass_computed(tmp_path: Path) -> None:
    model = LitLM()
    fit(model, tmp_path)
    converted = qaware.convert(model)
    assert loss(converted.module) == loss(model)
    assert type(model.body.up) is FakeQuantizedLinear, "a copy was converted"


def test_only_a_prepared_module_is_converted() -> None:
    with pytest.raises(QawareError, match="LitLM: is float; convert"):
        qaware.convert(LitLM())
    converted = qaware.convert(qaware.prepare(LitLM(), RECIPE))
    with pytest.raises(QawareError, match="LitLM: is converted; convert"):
        qaware.convert(converted.module)
    with pytest.raises(QawareError, match="integers cannot be trained"):
        trainer(callbacks=[QuantizationAwareTraining(RECIPE)]).fit(converted.module, loader())


def test_a_checkpoint_comes_back_prepared(tmp_path: Path) -> None:
    model = Sized(32)
    path = fit(model, tmp_path)
    loaded = qaware.load_from_checkpoint(Sized, path, extra=True)
    assert type(loaded) is Sized
    assert (loaded.hparams.width, loaded.hparams.extra) == (32, True)
    assert loaded.loaded == [RECIPE]
    assert type(loaded.body.up) is FakeQuantizedLinear
    assert loss(loaded) == loss(model)
    assert qaware.convert(loaded).weights.keys() == {"body.embed", "body.up", "body.down", "body.head"}


def test_a_float_checkpoint_comes_back_float(tmp_path: Path) -> None:
    run = trainer(max_epochs=1)
    run.fit(Sized(32), loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    assert type(qaware.load_from_checkpoint(Sized, tmp_path / "float.ckpt").body.up) is nn.Linear


def by_trainer(path: Path) -> None:
    trainer().validate(Sized(32), loader(9), ckpt_path=path)


def by_torch(path: Path) -> None:
    model = Sized(32)
    model.configure_model()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.parametrize("load", [Sized.load_from_checkpoint, by_trainer, by_torch])
def test_a_prepared_checkpoint_is_never_taken_for_a_float_one(
    load: Callable[[Path], object], tmp_path: Path
) -> None:
    path = fit(Sized(32), tmp_path)
    with pytest.raises(RuntimeError, match=r"up\.weight_fake_quantizer\.bits"):
        load(path)


def test_a_checkpoint_from_before_start_step_says_that_it_does_not_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Sized(32)
    path = fit(model, tmp_path, start_step=100)
    assert torch.load(path, weights_only=True)["qaware"]["fake_quant"] is False
    loaded = qaware.load_from_checkpoint(Sized, path)
    assert "its forward pass does not round" in caplog.text
    assert loss(loaded) == loss(model)


def test_weights_saved_after_fit_are_marked(tmp_path: Path) -> None:
    model = Sized(32)
    run = trainer(callbacks=[QuantizationAwareTraining(RECIPE, convert=False)], max_epochs=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert loss(qaware.load_from_checkpoint(Sized, tmp_path / "weights.ckpt")) == loss(model)


def test_a_checkpoint_of_a_crash_is_marked(tmp_path: Path) -> None:
    class Crashes(Sized):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("on purpose")

    qat = QuantizationAwareTraining(RECIPE, convert=False)
    run = trainer(callbacks=[qat, OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    with pytest.raises(KeyError, match="on purpose"):
        run.fit(Crashes(32), loader())
    model = qaware.load_from_checkpoint(Sized, tmp_path / "on_exception.ckpt")
    assert type(model.body.up) is FakeQuantizedLinear


def test_a_converted_model_is_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    run = trainer()
    run.strategy.connect(qaware.convert(qaware.prepare(LitLM(), RECIPE)).module)
    with pytest.raises(QawareError, match=r"save it with QuantizedModel\.save"):
        run.save_checkpoint(tmp_path / "converted.ckpt", weights_only=True)


def test_a_prepared_module_is_pickled(tmp_path: Path) -> None:
    model = qaware.prepare(LitLM(), RECIPE)
    assert loss(pickle.loads(pickle.dumps(model))) == loss(model)


def test_histograms_are_refused_in_training() -> None:
    scheme = {"bits": 8, "activation": "int8-static", "observer": "histogram"}
    recipe = {"rules": [{"type": "Linear", "scheme": scheme}]}
    model = LitLM()
    with pytest.raises(QawareError, match=r"body\.up: observer: 'histogram' needs two passes"):
        trainer(callbacks=[QuantizationAwareTraining(recipe)]).fit(model, loader())
    assert model.losses == []


def test_the_class_is_as_it_was_after_loading(tmp_path: Path) -> None:
    class Inherits(Sized):
        pass

    path = fit(Sized(32), tmp_path)
    hooks = vars(Sized)["on_load_checkpoint"]
    for cls in (Sized, Inherits):
        assert type(qaware.load_from_checkpoint(cls, path)) is cls
    with pytest.raises(FileNotFoundError):
        qaware.load_from_checkpoint(Inherits, tmp_path / "nowhere.ckpt")
    assert vars(Sized)["on_load_checkpoint"] is hooks
    assert "on_load_checkpoint" not in vars(Inherits)
