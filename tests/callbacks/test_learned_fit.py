"""Learned scales, low bits and annealed rounding inside real Trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lit import Counting, LitLM, loader, trainer
from resumable_loader import Resumable

from qaware import QawareError, QuantizationAwareTraining, load_from_checkpoint
from qaware.engines.learned import grids
from qaware.recipe import Recipe

INT4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
GRIDS = {
    "int4": INT4,
    "asymmetric": {**INT4, "bits": 3, "symmetric": False},
    "stretched": {**INT4, "bits": 2, "levels": "stretched"},
    "ternary": {**INT4, "bits": 2, "levels": "ternary", "activation": "int8-dynamic"},
}


def recipe(grid: str = "int4", learning: str = "lsq") -> Recipe:
    rules = [{"role": "embedding", "scheme": {"bits": 8}}, {"type": "Linear", "scheme": GRIDS[grid]}]
    return Recipe.from_dict({"name": grid, "learning": learning, "rules": rules})


def fit(callback: Any, *others: Any, ckpt_path: Any = None, **options: Any) -> LitLM:
    torch.manual_seed(0)
    model = LitLM()
    data = Resumable(Counting(0), batch_size=8)
    trainer(callbacks=[callback, *others], **options).fit(model, data, loader(9), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("learning", ["lsq", "range"])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_trained_is_what_is_converted(grid: str, learning: str, tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe(grid, learning), output_dir=tmp_path)
    model = fit(qat)
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses
    assert model.losses[-1] < model.losses[0]
    assert all(bool(grid.gain.ne(0).any()) for grid in grids(model))
    assert not any("gain" in name for name, _ in qat.result.model.module.named_parameters())


def test_training_is_float_before_start_step_and_the_scale_is_of_that_step() -> None:
    torch.manual_seed(0)
    plain = LitLM()
    trainer().fit(plain, loader(), loader(9))
    begun: list[bool] = []

    class Watched(QuantizationAwareTraining):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            begun.append(all(grid.known for grid in grids(args[1])))

    model = fit(Watched(recipe(), start_step=5, convert=False))
    assert model.losses[:5] == plain.losses[:5]
    assert model.losses[5:] != plain.losses[5:]
    assert begun == [False] * 4 + [True] * 8


@pytest.mark.parametrize(("start_step", "stop"), [(0, 6), (8, 6), (3, 6)])
def test_a_resume_in_mid_epoch_ends_with_the_same_bits(start_step: int, stop: int, tmp_path: Path) -> None:
    """From before the scales are known, and from the middle of the annealing."""

    def made() -> QuantizationAwareTraining:
        return QuantizationAwareTraining(
            recipe("asymmetric", "range"), start_step=start_step, anneal_steps=6, convert=False
        )

    expected = fit(made(), max_steps=12, max_epochs=-1)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="at-{step}")
    fit(made(), keep, max_steps=stop, max_epochs=-1, enable_checkpointing=True)
    found = fit(made(), ckpt_path=tmp_path / f"at-step={stop}.ckpt", max_steps=12, max_epochs=-1)
    assert found.losses == expected.losses[stop:]
    theirs = expected.state_dict()
    for name, value in found.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_the_best_checkpoint_tests_and_loads(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    torch.manual_seed(0)
    model = LitLM()
    model.test_step = model.validation_step  # type: ignore[method-assign]
    runner = trainer(
        callbacks=[QuantizationAwareTraining(recipe("stretched"), convert=False), keep],
        enable_checkpointing=True,
    )
    runner.fit(model, loader(), loader(9))
    (tested,) = runner.test(model, loader(9), ckpt_path="best", verbose=False)
    assert tested["val_loss"] == pytest.approx(float(keep.best_model_score or 0), abs=1e-6)
    loaded = load_from_checkpoint(LitLM, keep.best_model_path)
    assert all(grid.known for grid in grids(loaded))
    with torch.no_grad():
        batch = next(iter(loader(9)))
        torch.testing.assert_close(loaded.loss(batch), model.eval().loss(batch))


def test_a_checkpoint_of_another_grid_names_both(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    fit(QuantizationAwareTraining(recipe("stretched"), convert=False), keep, enable_checkpointing=True)
    other = QuantizationAwareTraining(recipe("int4"), convert=False)
    with pytest.raises(QawareError, match="type=Linear int2 stretched g32 there, type=Linear int4 g32 here"):
        fit(other, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("first", [True, False])
def test_an_average_has_scales_of_its_own_size(first: bool, tmp_path: Path) -> None:
    """The average is a copy from before the scales were known, and is validated while it still is one."""
    qat = QuantizationAwareTraining(recipe(), start_step=4, output_dir=tmp_path)
    average = EMAWeightAveraging(decay=0.9, update_starting_at_step=6)
    callbacks = [qat, average] if first else [average, qat]
    model = fit(*callbacks, val_check_interval=1)
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses
    for grid in grids(model):
        assert float((grid.base / grid.began * grid.gain.exp()).min()) > 1e-3
    shipped = qat.result.model.weights["body.up"].dequantize()
    assert float((shipped - model.body.up.weight).abs().mean()) < 0.02


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_with_distillation(options: dict[str, Any], tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe("stretched"), output_dir=tmp_path, distillation=0.5)
    fit(qat, **options)
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses


def test_rounding_hardens_step_by_step(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(QuantizationAwareTraining):
        def on_train_batch_start(self, *args: Any) -> None:
            super().on_train_batch_start(*args)
            softness = args[1].body.up.weight_fake_quantizer.softness
            seen.append(0.0 if softness is None else round(float(softness), 3))

    qat = Watched(recipe("ternary"), start_step=2, anneal_steps=4, output_dir=tmp_path)
    fit(qat)
    assert seen == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25] + [0.0] * 6
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses


def test_what_ends_while_it_anneals_is_rounded(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe(), anneal_steps=100, output_dir=tmp_path)
    fit(qat)
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses
    with pytest.raises(QawareError, match=r"^anneal_steps: -1 must be 0 or more"):
        QuantizationAwareTraining(recipe(), anneal_steps=-1)


def test_lora_is_trained_with_its_scale(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Adapted(LitLM):
        def __init__(self) -> None:
            super().__init__()
            config = peft.LoraConfig(r=2, target_modules=["up", "down"])
            self.body = peft.inject_adapter_in_model(config, self.body)

    torch.manual_seed(0)
    model = Adapted()
    qat = QuantizationAwareTraining(recipe(), output_dir=tmp_path)
    trainer(callbacks=[qat]).fit(model, loader(), loader(9))
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses
    assert all(bool(grid.gain.ne(0).any()) for grid in grids(model))
