"""A run that is stopped and resumed ends with the bits of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler

from qaware.callbacks import QuantizationAwareTraining
from qaware.observers import observers

from .data import images, sequences
from .models import BuiltInConfigureModel, BuiltInParts, BuiltInSetup, Classifier, Gan, LitLM
from .runs import EPOCH_END, INT4, STATIC, fake_quantized, make, qat, require_exact_resume, trainer

PHASES = [
    pytest.param({"start_step": 8, "freeze_observers_step": 11}, id="float"),
    pytest.param({"start_step": 2, "freeze_observers_step": 11}, id="rounding"),
    pytest.param({"start_step": 2, "freeze_observers_step": 3}, id="frozen"),
]
STOPS = [
    pytest.param(4, id="mid-epoch"),
    pytest.param(6, id="last-batch"),
    pytest.param(EPOCH_END, id="epoch-end"),
]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_03_resume_is_exact_in_every_phase(
    recipe: str, phases: dict[str, int], stop: int, tmp_path: Path
) -> None:
    """Lightning #6457 #8485 #11346, fms-model-optimizer #98: every loss and every tensor of model, optimizer
    and observers, from each phase of the schedule, in the middle of an epoch and at both of its ends."""
    require_exact_resume(LitLM, lambda: [qat(recipe, convert=False, **phases)], tmp_path, stop)


@pytest.mark.parametrize("cls", [BuiltInSetup, BuiltInConfigureModel, BuiltInParts])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_case_03_resume_is_exact_however_late_the_model_is_built(
    cls: type[LitLM], precision: str, tmp_path: Path
) -> None:
    """Lightning #11346 #18936: layers that are built after ``__init__`` are prepared before their weights are
    loaded, in every precision."""
    require_exact_resume(
        cls, lambda: [qat(STATIC, start_step=2, convert=False)], tmp_path, 4, precision=precision
    )


class Flags(QuantizationAwareTraining):
    """Notes what the forward pass of each step is about to do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, bool, bool]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *args)
        rounds = pl_module.body.up.weight_fake_quantizer.enabled
        self.seen.append((trainer.global_step, rounds, next(observers(pl_module)).observing))


@pytest.mark.parametrize("stop", [3, 7, 10])
def test_case_26_start_and_freeze_steps_hold_after_a_resume(stop: int, tmp_path: Path) -> None:
    """axolotl's and torchtune's callbacks, super-gradients #232: a resume before ``start_step`` trained with
    rounding already. Which steps round and observe, in an uninterrupted, a stopped and a resumed run."""
    made: list[Flags] = []

    def callbacks() -> list[Flags]:
        made.append(Flags(STATIC, start_step=5, freeze_observers_step=9, score=False, convert=False))
        return [made[-1]]

    require_exact_resume(LitLM, callbacks, tmp_path, stop)
    expected = [(step, step >= 5, step < 9) for step in range(12)]
    assert made[0].seen == expected
    assert made[1].seen == expected[:stop]
    assert made[2].seen == expected[stop:]


def test_resume_is_exact_with_accumulated_and_clipped_gradients(tmp_path: Path) -> None:
    """A step is an optimizer step: 2 batches each here, so ``start_step`` counts 3 of 6."""
    made: list[Flags] = []

    def callbacks() -> list[Flags]:
        made.append(Flags(STATIC, start_step=3, score=False, convert=False))
        return [made[-1]]

    require_exact_resume(LitLM, callbacks, tmp_path, stop=2, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert [(step, rounds) for step, rounds, _ in made[0].seen] == [(i // 2, i >= 6) for i in range(12)]


def test_resume_is_exact_with_a_schedule_of_accumulation(tmp_path: Path) -> None:
    """GradientAccumulationScheduler: 6 steps in the first epoch, 3 in the second."""

    def callbacks() -> list[Any]:
        return [qat(STATIC, start_step=4, convert=False), GradientAccumulationScheduler({1: 2})]

    require_exact_resume(LitLM, callbacks, tmp_path, stop=4)


def test_resume_is_exact_with_early_stopping(tmp_path: Path) -> None:
    """EarlyStopping's own state goes through the same checkpoint."""

    def callbacks() -> list[Any]:
        return [EarlyStopping("val_loss", patience=3), qat(convert=False)]

    require_exact_resume(LitLM, callbacks, tmp_path, stop=EPOCH_END)


def test_resume_is_exact_with_batch_norm(tmp_path: Path) -> None:
    """Running statistics and observers are buffers of one checkpoint."""
    require_exact_resume(
        Classifier, lambda: [qat(STATIC, convert=False)], tmp_path, stop=4, train=images, val=images
    )


@pytest.mark.parametrize("recipe", [STATIC, "int8-weight-only"])
def test_case_30_several_optimizers_stepped_by_hand(recipe: str, tmp_path: Path) -> None:
    """A GAN in manual optimization: its generator alone is quantized, and a resume is exact."""
    # Each batch steps two optimizers, and Lightning counts both: 12 steps an epoch.
    expected = require_exact_resume(
        Gan,
        lambda: [qat(recipe, target="gen", start_step=6, convert=False)],
        tmp_path,
        stop=8,
        train=images,
        val=images,
    )
    assert len(expected.losses) == 24


def test_case_30_the_discriminator_stays_float() -> None:
    """The generator of a GAN is converted; the discriminator has no part in it."""
    gan, callback = make(Gan), qat(STATIC, target="gen")
    trainer(callback).fit(gan, images(), images(1))
    assert fake_quantized(gan) == {"gen.0", "gen.2"}
    assert callback.result is not None
    assert set(callback.result.model.weights) == {"0", "2"}


def test_a_resume_of_a_finished_run_converts_what_was_finished(tmp_path: Path) -> None:
    """``fit(ckpt_path="last")`` with nothing left to train gives the same integers."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    first, again = qat(), qat()
    trainer(first, ModelCheckpoint(dirpath=tmp_path, save_last=True)).fit(make(), sequences(), sequences(9))
    trainer(again).fit(make(seed=77), sequences(), sequences(9), ckpt_path=tmp_path / "last.ckpt")
    assert first.result is not None
    assert again.result is not None
    for name, weight in first.result.model.weights.items():
        assert weight.data.equal(again.result.model.weights[name].data), name
