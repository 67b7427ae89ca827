"""QuantizationAwareTraining inside real Trainers."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lit import LitClassifier, LitLM, images, loader, trainer
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.qat import FakeQuantizedLinear
from torchmetrics import MeanMetric

from qaware import QawareError, QuantizationAwareTraining, Recipe
from qaware.callbacks.hooks import NAMES
from qaware.observers import observers
from qaware.report.ledger import read_rows

RECIPE = "int8-dynamic-int4-weight"


def fit(model: LitLM, callback: QuantizationAwareTraining, **options: object) -> LitLM:
    torch.manual_seed(0)
    trainer(callbacks=[callback], **options).fit(model, loader(), loader(9))
    return model


def test_the_converted_copy_computes_what_training_saw(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(RECIPE, output_dir=tmp_path)
    model = fit(LitLM(), qat)
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses
    assert isinstance(qat.result.model.module.body.up.weight, IntxUnpackedToInt8Tensor)
    assert type(model.body.up) is FakeQuantizedLinear, "the module itself stays trainable"
    assert model.losses[-1] < model.losses[0]


def test_files_and_rows(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(RECIPE, output_dir=tmp_path)
    fit(LitLM(), qat)
    rows = read_rows(tmp_path / "results.jsonl")
    assert [(r["model"], r["stage"]) for r in rows] == [
        ("float", "float"),
        (f"{RECIPE} qat", "prepared"),
        (f"{RECIPE} qat", "converted"),
    ]
    assert len({r["fingerprint"] for r in rows}) == 1
    assert rows[-1]["bytes"] < 0.25 * rows[0]["bytes"]
    plan = json.loads((tmp_path / f"{RECIPE}-qat.plan.json").read_text())
    assert {p["parameter"]: p["reason"] for p in plan["parameters"]}["body.up.bias"] == "a bias stays float"
    assert (tmp_path / "report.md").exists()


def test_the_default_folder_is_never_one_that_is_filled(tmp_path: Path) -> None:
    folders = []
    for _ in range(2):
        qat = QuantizationAwareTraining(RECIPE)
        fit(LitLM(), qat, default_root_dir=tmp_path, max_epochs=1)
        folders.append(qat.output_dir)
    assert folders == [tmp_path / "quantized", tmp_path / "quantized-1"]


def test_start_step_is_a_step_not_a_switch() -> None:
    model = fit(LitLM(), QuantizationAwareTraining(RECIPE, start_step=5, score=False))
    assert model.flags == [False] * 5 + [True] * 7


def test_float_training_before_start_step() -> None:
    plain = LitLM()
    plain.load_state_dict(seeded().state_dict())
    trainer().fit(plain, loader(), loader(9))
    model = seeded()
    trainer(callbacks=[QuantizationAwareTraining(RECIPE, start_step=5)]).fit(model, loader(), loader(9))
    assert model.losses[:5] == plain.losses[:5]
    assert model.losses[5:] != plain.losses[5:]


def seeded() -> LitLM:
    torch.manual_seed(3)
    return LitLM()


def test_observers_see_training_data_only_and_freeze() -> None:
    ranges = []
    for seed, sanity in ((1, 0), (2, 2)):
        model = seeded()
        qat = QuantizationAwareTraining("int8-static", score=False, convert=False)
        trainer(callbacks=[qat], num_sanity_val_steps=sanity).fit(model, loader(), loader(seed))
        ranges.append([(o.min_val.item(), o.max_val.item()) for o in observers(model)])
    assert ranges[0] == ranges[1]
    assert all(low < high for low, high in ranges[0])


def test_freeze_observers_step() -> None:
    seen: list[list[float]] = []

    class Watch(QuantizationAwareTraining):
        def on_train_batch_end(self, trainer: object, pl_module: object, *args: object) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append([o.max_val.item() for o in observers(pl_module)])

    fit(LitLM(), Watch("int8-static", freeze_observers_step=4, score=False, convert=False))
    assert seen[3] == seen[-1]
    assert seen[0] != seen[3]


def test_scoring_does_not_change_training() -> None:
    losses = []
    for score in (True, False):
        model = seeded()
        torch.manual_seed(0)
        trainer(callbacks=[QuantizationAwareTraining(RECIPE, score=score)]).fit(model, loader(), loader(9))
        losses.append(model.losses)
    assert losses[0] == losses[1]


def test_a_model_built_in_configure_model_is_prepared_before_its_optimizer() -> None:
    qat = QuantizationAwareTraining(RECIPE)
    model = fit(LitLM(lazy=True), qat)
    assert type(model.body.up) is FakeQuantizedLinear
    assert qat.result is not None


def test_a_submodule_alone_is_quantized() -> None:
    qat = QuantizationAwareTraining("int8-weight-only", target="net")
    model = LitClassifier()
    trainer(callbacks=[qat]).fit(model, images(), images(1))
    assert qat.result is not None
    assert qat.result.scores["converted"].accuracy is not None
    assert qat.result.scores["converted"].accuracy > 0.9
    assert isinstance(qat.result.model.module, nn.Sequential)


def test_a_target_that_the_step_never_calls_is_named() -> None:
    with pytest.raises(QawareError, match=r"LitClassifier was not called by validation_step; give target="):
        trainer(callbacks=[QuantizationAwareTraining("int8-weight-only")]).fit(
            LitClassifier(), images(), images(1)
        )


def test_unknown_target_names_the_submodules() -> None:
    with pytest.raises(QawareError, match=r"'nett' is not a submodule of LitClassifier; it has net"):
        trainer(callbacks=[QuantizationAwareTraining("float16", target="nett")]).fit(
            LitClassifier(), images()
        )


def test_an_impossible_recipe_is_refused_before_training() -> None:
    recipe = {"rules": [{"type": "Linear", "scheme": {"bits": 4, "group_size": 48}}]}
    model = LitLM()
    with pytest.raises(
        QawareError, match=r"body\.up: group_size 48 does not divide its 32 input weights; nearest"
    ):
        trainer(callbacks=[QuantizationAwareTraining(recipe)]).fit(model, loader(), loader(9))
    assert model.losses == []
    assert not set(NAMES) & set(model.__dict__), "nothing of ours is left on the module"


def test_overrides_are_removed_and_a_second_fit_works() -> None:
    model = LitLM()
    for _ in range(2):
        qat = QuantizationAwareTraining(RECIPE)
        fit(model, qat, max_epochs=1)
        assert not set(NAMES) & set(model.__dict__)
        assert qat.result is not None


def test_the_callback_state_is_plain_data(tmp_path: Path) -> None:
    run = trainer(callbacks=[QuantizationAwareTraining(RECIPE, convert=False)])
    run.fit(LitLM(), loader(), loader(9))
    run.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["callbacks"]["qaware.QuantizationAwareTraining"] == {"recipe_hash": Recipe.load(RECIPE).hash}


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_weights_only=True)
    first = QuantizationAwareTraining(RECIPE, convert=False)
    trainer(callbacks=[first, keep], enable_checkpointing=True).fit(LitLM(), loader(), loader(9))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["qaware"]["phase"] == "prepared"
    other = QuantizationAwareTraining("int8-weight-only", convert=False)
    with pytest.raises(QawareError, match="was prepared under recipe 'int8-dynamic-int4-weight'"):
        trainer(callbacks=[other]).validate(
            LitLM(), loader(9), ckpt_path=tmp_path / "last.ckpt", verbose=False
        )


def test_a_checkpoint_is_validated_as_it_was_trained(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    model = LitLM()
    run = trainer(
        callbacks=[QuantizationAwareTraining(RECIPE, convert=False), keep], enable_checkpointing=True
    )
    run.fit(model, loader(), loader(9))
    trained = run.validate(model, loader(9), verbose=False)
    restored = LitLM()
    check = trainer(callbacks=[QuantizationAwareTraining(RECIPE)])
    value = check.validate(restored, loader(9), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert value == trained
    assert type(restored.body.up) is FakeQuantizedLinear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_step": -1}, "start_step: -1 must be 0 or more"),
        ({"freeze_observers_step": 0}, "freeze_observers_step: 0 must be at least 1"),
        ({"export": "tract"}, "must be a list"),
        ({"export": ["tracts"]}, "runtime: 'tracts' is not one of"),
        ({"on_failure": "ignore"}, "on_failure: 'ignore' is not one of"),
        ({"score_batches": 0}, "score_batches: 0 must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(QawareError, match=message):
        QuantizationAwareTraining(RECIPE, **arguments)


def test_a_dry_run_scores_one_batch(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(RECIPE, output_dir=tmp_path)
    trainer(callbacks=[qat], fast_dev_run=True).fit(LitLM(), loader(), loader(9))
    assert qat.result is not None
    assert len(qat.result.scores["converted"].losses) == 8, "the rows of one batch"


def test_a_logged_metric_object(tmp_path: Path) -> None:
    class Metered(LitLM):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
            self.mean(self.loss(batch))
            self.log("mean", self.mean)
            self.logger.experiment.add_scalar("own", 1.0)

    qat = QuantizationAwareTraining(RECIPE, output_dir=tmp_path)
    board = TensorBoardLogger(tmp_path)
    trainer(callbacks=[qat], logger=board, max_epochs=1).fit(Metered(), loader(), loader(9))
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses


def test_a_kept_datamodule_does_not_bring_the_trainer(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> object:
            return loader()

        val_dataloader = train_dataloader

    model, qat = LitLM(), QuantizationAwareTraining(RECIPE, output_dir=tmp_path)
    model.data = Data()
    trainer(callbacks=[qat], max_epochs=1).fit(model, datamodule=model.data)
    assert model.data.trainer is not None
    assert qat.result.model.module.data.trainer is None


def test_a_resume_of_a_finished_run_is_scored(tmp_path: Path) -> None:
    """As after a crash in the export, when nothing is left to train."""
    first, again = LitLM(), QuantizationAwareTraining(RECIPE, output_dir=tmp_path / "again")
    qat = QuantizationAwareTraining(RECIPE, output_dir=tmp_path / "first")
    run = trainer(callbacks=[qat], max_epochs=1)
    run.fit(first, loader(), loader(9))
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(callbacks=[again], max_epochs=1)
    resumed.fit(LitLM(), loader(), loader(9), ckpt_path=tmp_path / "last.ckpt")
    assert again.result.scores["converted"].losses == qat.result.scores["converted"].losses
