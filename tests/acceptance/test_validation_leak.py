"""What the model is validated, tested or calibrated on must not find its way into the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

from qaware import PostTrainingQuantization
from qaware.observers import observers

from .data import Resumable, images, sequences
from .models import Classifier, LitLM
from .runs import STATIC, Outcome, different, make, outcome, qat, trainer

HISTOGRAM = {
    "rules": [{"type": "Linear", "scheme": {"bits": 8, "activation": "int8-static", "observer": "histogram"}}]
}


def large(seed: int) -> Resumable:
    """Data with activations that no training batch has; the larger the seed, the larger."""
    return sequences(seed, scale=1.0 + 3 * seed)


def fitted(val_seed: int, folder: Path, *callbacks: pl.Callback, **options: Any) -> Outcome:
    module = make()
    run = trainer(*callbacks, **options)
    run.fit(module, sequences(), large(val_seed))
    return outcome(run, module, folder)


def orders(*others: Callable[[], pl.Callback]) -> Callable[[bool], Sequence[pl.Callback]]:
    def build(first: bool) -> list[pl.Callback]:
        rest = [other() for other in others]
        ours = qat(STATIC, start_step=3, convert=False)
        return [ours, *rest] if first else [*rest, ours]

    return build


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([], id="alone"),
        pytest.param([lambda: EMAWeightAveraging(decay=0.9)], id="ema"),
        pytest.param([lambda: EMAWeightAveraging(decay=0.9, use_buffers=False)], id="ema-parameters"),
        pytest.param([WeightAveraging], id="average"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_08_validation_data_never_moves_observers(
    others: list[Callable[[], pl.Callback]], first: bool, tmp_path: Path
) -> None:
    """Lightning #8507 #8540, aiaccel #554: averaging callbacks swap every buffer while they validate, so a
    switch that is a buffer is swapped too. Other validation data, and any number of sanity steps, change no
    loss and no tensor."""
    build = orders(*others)
    runs = [
        fitted(1, tmp_path, *build(first), num_sanity_val_steps=0),
        fitted(2, tmp_path, *build(first), num_sanity_val_steps=0),
        fitted(2, tmp_path, *build(first), num_sanity_val_steps=2, val_check_interval=2),
    ]
    assert runs[0].losses == runs[1].losses == runs[2].losses
    assert different(runs[0], runs[1]) == different(runs[1], runs[2]) == []
    assert all(torch.isfinite(v).all() for n, v in runs[0].state.items() if "observer" in n)


def test_case_08_test_and_predict_data_never_move_observers(tmp_path: Path) -> None:
    """Lightning #8507: ``validate``, ``test`` and ``predict`` after a fit, with the callback and without."""
    module, callback = make(), qat(STATIC)
    run = trainer(callback)
    run.fit(module, sequences(), sequences(9))
    before = [(o.min_val.item(), o.max_val.item()) for o in observers(module)]
    for other in (run, trainer(callback), trainer()):
        other.validate(module, large(5), verbose=False)
        other.test(module, large(6), verbose=False)
        other.predict(module, large(7))
    assert [(o.min_val.item(), o.max_val.item()) for o in observers(module)] == before
    assert len(before) == 3


def test_scores_move_nothing(tmp_path: Path) -> None:
    """The callback's own scoring, before and after training, is an evaluation too."""
    runs = []
    for score in (True, False):
        module = make()
        run = trainer(qat(STATIC, score=score))
        run.fit(module, sequences(), large(9))
        runs.append(outcome(run, module, tmp_path))
    assert runs[0].losses == runs[1].losses
    assert different(*runs) == []


def calibrated(recipe: Any, val_seed: int) -> dict[str, Any]:
    ptq = PostTrainingQuantization(recipe, calibration=sequences(0), calibration_batches=4, score=True)
    trainer(ptq).validate(make(), large(val_seed), verbose=False)
    assert ptq.result is not None
    return ptq.result.model.activations


@pytest.mark.parametrize("recipe", [STATIC, HISTOGRAM], ids=["minmax", "histogram"])
def test_case_09_calibration_sees_its_own_batches_only(recipe: Any) -> None:
    """The note in the docstring of Lightning #8540: histogram observers were never switched off. The ranges
    depend on the calibration data and on nothing that is validated or scored."""
    first = calibrated(recipe, 1)
    assert first == calibrated(recipe, 2)
    assert set(first) == {"body.up", "body.down", "body.head"}


def test_case_09_histogram_ranges_are_tighter_than_the_extremes() -> None:
    """So that the case above is about another observer than minmax."""
    extremes, fitted = calibrated(STATIC, 1), calibrated(HISTOGRAM, 1)
    assert all(fitted[name].scale <= extremes[name].scale * 1.001 for name in extremes)
    assert any(fitted[name].scale < extremes[name].scale for name in extremes)


def test_case_38_calibrating_in_inference_mode_leaves_a_module_that_trains() -> None:
    """``Trainer.validate`` runs in inference mode: tensors that are made there can be neither updated nor
    trained. Calibrate in one, then train the same module, quantized and not."""
    module = make(Classifier)
    ptq = PostTrainingQuantization(STATIC, target="net", calibration=images())
    trainer(ptq, inference_mode=True).validate(module, images(1, scale=3.0), verbose=False)
    assert not any(t.is_inference() for t in [*module.parameters(), *module.buffers()])
    assert ptq.result is not None
    assert not any(t.is_inference() for t in ptq.result.model.module.state_dict().values())
    trainer(max_epochs=1).fit(module, images())
    callback = qat(STATIC, target="net")
    trainer(callback, max_epochs=1).fit(module, images(), images(1))
    assert callback.result is not None
    assert len(module.losses) == 12
    assert module.losses[-1] < module.losses[0]


def test_case_38_a_module_that_is_first_built_while_validating_trains() -> None:
    """Validated before it is fitted, with the QAT callback already there."""
    from .models import BuiltInConfigureModel

    module, callback = make(BuiltInConfigureModel), qat(STATIC)
    run = trainer(callback)
    run.validate(module, sequences(9), verbose=False)
    assert not any(t.is_inference() for t in module.parameters())
    run.fit(module, sequences(), sequences(9))
    assert callback.result is not None
    assert isinstance(module, LitLM)
    assert module.losses[-1] < module.losses[0]
