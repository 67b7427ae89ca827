"""PostTrainingQuantization inside real Trainers, and the exports of both callbacks."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lit import LitClassifier, LitLM, images, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader

import qaware
from qaware import ParityError, PostTrainingQuantization, QawareError, QuantizationAwareTraining
from qaware.engines.base import ActivationRange
from qaware.exporters.artifact import Artifact
from qaware.report.ledger import read_rows


def test_after_fit_the_module_is_still_float(tmp_path: Path) -> None:
    ptq = PostTrainingQuantization("int4-weight-only", output_dir=tmp_path)
    model = LitLM()
    trainer(callbacks=[ptq]).fit(model, loader(), loader(9))
    assert type(model.body.up) is torch.nn.Linear
    assert ptq.result is not None
    rows = read_rows(tmp_path / "results.jsonl")
    assert [r["stage"] for r in rows] == ["float", "converted"]
    assert rows[1]["d_nats"] == pytest.approx(rows[1]["nats"] - rows[0]["nats"])
    assert rows[1]["kl"] > 0


def test_validate_quantizes_a_model_that_is_not_trained(tmp_path: Path) -> None:
    model = LitLM()
    before = copy.deepcopy(model.state_dict())
    ptq = PostTrainingQuantization("int8-dynamic", output_dir=tmp_path)
    trainer(callbacks=[ptq]).validate(model, loader(9), verbose=False)
    assert ptq.result is not None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    weight = next(iter(ptq.result.model.weights.values()))
    assert not weight.data.is_inference()


def test_static_ranges_come_from_training_data(tmp_path: Path) -> None:
    scales = []
    for validation in (images(1), images(1, scale=50.0)):
        torch.manual_seed(0)
        ptq = PostTrainingQuantization("int8-static", target="net", output_dir=tmp_path / str(len(scales)))
        trainer(callbacks=[ptq]).fit(LitClassifier(), images(), validation)
        assert ptq.result is not None
        scales.append(ptq.result.model.activations["0"].scale)
    assert scales[0] == scales[1]


def test_calibration_takes_as_many_batches_as_asked(tmp_path: Path) -> None:
    seen = []

    class Counts(LitClassifier):
        def validation_step(self, batch: list, batch_idx: int) -> None:
            seen.append(len(batch[0]))
            super().validation_step(batch, batch_idx)

    ptq = PostTrainingQuantization(
        "int8-static",
        target="net",
        score=False,
        calibration=images(5),
        calibration_batches=2,
        output_dir=tmp_path,
    )
    run = trainer(callbacks=[ptq])
    run.validate(Counts(), images(1), verbose=False)
    # Four to validate, one to see where activations are rounded, two to calibrate.
    assert len(seen) == 4 + 1 + 2


@pytest.mark.usefixtures("fake_runtime")
def test_an_export_is_checked_scored_and_kept(tmp_path: Path) -> None:
    ptq = PostTrainingQuantization("int8-weight-only", export=["fake"], output_dir=tmp_path)
    trainer(callbacks=[ptq]).fit(LitLM(), loader(), loader(9))
    assert ptq.result is not None
    artifact = Artifact.open(ptq.result.artifacts["fake"].path)
    assert artifact.parity is not None
    assert artifact.parity["relative"] == 0
    assert artifact.recipe["name"] == "int8-weight-only"
    assert artifact.signature.inputs[0].high == 63
    row = read_rows(tmp_path / "results.jsonl")[-1]
    assert row["stage"] == "fake"
    assert row["bytes"] == artifact.bytes
    assert ptq.result.scores["fake"].losses == ptq.result.scores["converted"].losses


@pytest.mark.usefixtures("fake_runtime")
def test_a_wrong_artifact_fails_the_run_after_the_others_are_done(tmp_path: Path) -> None:
    ptq = PostTrainingQuantization("int8-weight-only", export=["wrong", "fake"], output_dir=tmp_path)
    with pytest.raises(ParityError, match=r"int8-weight-only-ptq\.wrong: does not compute"):
        trainer(callbacks=[ptq]).fit(LitLM(), loader(), loader(9))
    assert ptq.result is not None
    assert list(ptq.result.artifacts) == ["fake"]
    assert (tmp_path / "int8-weight-only-ptq.wrong.rejected").exists()
    assert not (tmp_path / "int8-weight-only-ptq.wrong").exists()
    assert "FAILED" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("fake_runtime")
def test_on_failure_warn_goes_on(tmp_path: Path) -> None:
    ptq = PostTrainingQuantization(
        "int8-weight-only", export=["wrong"], output_dir=tmp_path, on_failure="warn"
    )
    trainer(callbacks=[ptq]).fit(LitLM(), loader(), loader(9))
    assert ptq.result is not None
    assert list(ptq.result.failures) == ["wrong"]


@pytest.mark.usefixtures("fake_runtime")
def test_a_scheme_that_the_runtime_refuses_stops_before_training(tmp_path: Path) -> None:
    recipe = {"rules": [{"name": "*.down", "scheme": {"bits": 3}}]}
    model = LitLM()
    ptq = PostTrainingQuantization(recipe, export=["fake"], output_dir=tmp_path)
    with pytest.raises(QawareError, match=r"body\.down: fake: 3 bits have no kernel; nearest legal: int4"):
        trainer(callbacks=[ptq]).fit(model, loader(), loader(9))
    assert model.losses == []


@pytest.mark.usefixtures("fake_runtime")
def test_a_classifier_is_exported_with_a_dynamic_batch(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining("int8-weight-only", target="net", export=["fake"], output_dir=tmp_path)
    trainer(callbacks=[qat]).fit(LitClassifier(), images(), images(1))
    assert qat.result is not None
    assert qat.result.artifacts["fake"].signature.inputs[0].shape == ("batch", 16)
    assert qat.result.scores["fake"].accuracy == qat.result.scores["converted"].accuracy


@pytest.mark.usefixtures("fake_runtime")
def test_a_regression_has_parity_but_no_score(tmp_path: Path) -> None:
    class Regression(LitClassifier):
        def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0])[:, 0].pow(2).mean()

        def validation_step(self, batch: list, batch_idx: int) -> None:
            self.log("val", self.net(batch[0].float()).pow(2).mean())

    data = torch.utils.data.DataLoader([[torch.randn(16)] for _ in range(8)], batch_size=4)
    ptq = PostTrainingQuantization("int8-weight-only", target="net", export=["fake"], output_dir=tmp_path)
    trainer(callbacks=[ptq]).fit(Regression(), data, data)
    assert ptq.result is not None
    assert ptq.result.scores == {}
    assert ptq.result.parity["fake"].relative == 0


def test_a_qat_module_is_not_quantized_again() -> None:
    model = LitLM()
    trainer(callbacks=[QuantizationAwareTraining("float16", convert=False)]).fit(model, loader(), loader(9))
    with pytest.raises(QawareError, match="LitLM: was prepared for QAT"):
        trainer(callbacks=[PostTrainingQuantization("float16")]).validate(model, loader(9), verbose=False)


def test_without_validation_data_the_model_is_converted_but_not_scored(tmp_path: Path) -> None:
    ptq = PostTrainingQuantization("float16", output_dir=tmp_path)
    trainer(callbacks=[ptq]).fit(LitLM(), loader())
    assert ptq.result is not None
    assert ptq.result.scores == {}
    with pytest.raises(QawareError, match="export: needs one batch of tensors"):
        trainer(callbacks=[PostTrainingQuantization("int8-dynamic", export=["aoti"])]).fit(LitLM(), loader())


def test_padded_batches_of_a_transformers_style_module(tmp_path: Path) -> None:
    class Masked(LitLM):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict:
            assert self.body is not None
            return self.body(ids=input_ids)

        def loss(self, batch: dict) -> torch.Tensor:
            mask = torch.ones_like(batch["ids"])
            mask[0, 10:] = 0
            out = self(input_ids=batch["ids"], attention_mask=mask)["logits"]
            return out.pow(2).mean()

    ptq = PostTrainingQuantization("int8-weight-only", output_dir=tmp_path)
    trainer(callbacks=[ptq]).validate(Masked(), loader(9), verbose=False)
    row = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert row["count"] == 28 * 15 + 4 * 9


def test_fast_dev_run_converts_without_exporting(tmp_path: Path) -> None:
    ptq = PostTrainingQuantization("int8-dynamic", export=["aoti"], output_dir=tmp_path)
    trainer(callbacks=[ptq], fast_dev_run=True).fit(LitLM(), loader(), loader(9))
    assert ptq.result is not None
    assert ptq.result.artifacts == {}
    assert isinstance(ptq, pl.Callback)


def calibrated(ptq: PostTrainingQuantization) -> dict[str, ActivationRange]:
    assert ptq.result is not None
    return ptq.result.model.activations


def static(observer: str = "minmax", **options: Any) -> PostTrainingQuantization:
    scheme = {"bits": 8, "activation": "int8-static", "observer": observer}
    recipe = {"name": observer, "rules": [{"type": "Linear", "scheme": scheme}]}
    return PostTrainingQuantization(recipe, score=False, **options)


def classifier() -> LitClassifier:
    torch.manual_seed(0)
    return LitClassifier()


def input_scale(*loaders: Any, count: int = 32) -> float:
    """Of the first layer: what it sees is the data."""
    seen = torch.cat([batch[0] for data in loaders for batch in itertools.islice(data, count)])
    return (float(seen.max()) - float(seen.min())) / 255


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_validation_and_sanity_data_moves_no_range(observer: str, tmp_path: Path) -> None:
    """The only model of which observers are told is a copy, and it is calibrated on training data."""
    found = []
    for sanity, validation in ((0, images(1)), (2, images(1, scale=50.0))):
        torch.manual_seed(0)
        ptq = static(observer, output_dir=tmp_path / str(sanity))
        model = classifier()
        run = trainer(callbacks=[ptq], num_sanity_val_steps=sanity)
        run.fit(model, images(), validation)
        found.append(calibrated(ptq))
    assert found[0] == found[1]


def test_without_training_data_the_validation_data_calibrates_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ptq = static(target="net", output_dir=tmp_path)
    with caplog.at_level("INFO"):
        trainer(callbacks=[ptq]).validate(classifier(), images(1), verbose=False)
    assert calibrated(ptq)["0"].scale == pytest.approx(input_scale(images(1)), rel=1e-6)
    said = [r.message for r in caplog.records if "calibrated on the validation data" in r.message]
    assert len(said) == 1
    assert "give calibration= other data" in said[0]


def test_given_calibration_data_comes_first(tmp_path: Path) -> None:
    ptq = static(target="net", output_dir=tmp_path, calibration=images(5), calibration_batches=3)
    trainer(callbacks=[ptq]).fit(classifier(), images(), images(1))
    assert calibrated(ptq)["0"].scale == pytest.approx(input_scale(images(5), count=3), rel=1e-6)


def test_calibration_data_that_cannot_work(tmp_path: Path) -> None:
    for wrong in (7, torch.ones(2, 16), "train"):
        with pytest.raises(QawareError, match=r"calibration: a .* is no loader"):
            static(calibration=wrong)
    nothing = static(target="net", output_dir=tmp_path, calibration=DataLoader([]))
    with pytest.raises(QawareError, match="calibration: the loader gave no batch"):
        trainer(callbacks=[nothing]).validate(classifier(), images(1), verbose=False)
    broken = [(torch.full((4, 16), torch.nan), torch.zeros(4, dtype=torch.int64))]
    unseen = static(target="net", output_dir=tmp_path, calibration=DataLoader(broken, batch_size=None))
    with pytest.raises(
        QawareError, match=r"calibration: batch 0 \(the first is 0\) has NaN .* at \[0\] \(64 of"
    ):
        trainer(callbacks=[unseen]).validate(classifier(), images(1), verbose=False)


class Stages(pl.LightningDataModule):
    """Builds each part in its own stage, as Lightning's documentation has it, and drops all in the end."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train = images()
        self.val = images(1, scale=9.0)

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return self.val

    def teardown(self, stage: str) -> None:
        del self.val


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
@pytest.mark.parametrize("fit", [True, False])
def test_a_datamodule_calibrates_on_its_training_part(fit: bool, observer: str, tmp_path: Path) -> None:
    ptq = static(observer, target="net", output_dir=tmp_path)
    run = trainer(callbacks=[ptq], max_epochs=1)
    if fit:
        run.fit(classifier(), datamodule=Stages())
    else:
        run.validate(classifier(), datamodule=Stages(), verbose=False)
    expected = input_scale(images())
    assert 0.9 * expected < calibrated(ptq)["0"].scale <= 1.000001 * expected


def test_a_datamodule_without_training_part_calibrates_on_validation_data(tmp_path: Path) -> None:
    class Only(pl.LightningDataModule):
        def val_dataloader(self) -> Any:
            return images(1)

    ptq = static(target="net", output_dir=tmp_path)
    trainer(callbacks=[ptq]).validate(classifier(), datamodule=Only(), verbose=False)
    assert calibrated(ptq)["0"].scale == pytest.approx(input_scale(images(1)), rel=1e-6)


@dataclass
class Sample:
    x: Tensor
    label: Tensor


class Custom:
    """Neither a container nor anything that knows how to move."""

    def __init__(self, x: Tensor, label: Tensor) -> None:
        self.x, self.label = x, label


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda x, y: (x, y), lambda batch: batch[0]),
    "dict": (lambda x, y: {"image": x, "label": y}, lambda batch: batch["image"]),
    "nested": (lambda x, y: {"in": [x, {"deep": x}], "y": y}, lambda batch: batch["in"][1]["deep"]),
    "dataclass": (Sample, lambda batch: batch.x),
    "custom": (Custom, lambda batch: batch.x),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", [True, False])
def test_any_batch_that_the_validation_step_takes(kind: str, fit: bool, tmp_path: Path) -> None:
    make, x_of = KINDS[kind]

    class Lit(LitClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(x_of(batch)).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.net(x_of(batch)).square().mean(), batch_size=16)

    def batches(seed: int) -> list[Any]:
        return [make(x, y) for x, y in images(seed)]

    torch.manual_seed(0)
    ptq = PostTrainingQuantization("int8-static", target="net", output_dir=tmp_path)
    data = [DataLoader(batches(seed), batch_size=None, collate_fn=lambda b: b) for seed in (0, 1)]
    run = trainer(callbacks=[ptq], max_epochs=1)
    if fit:
        run.fit(Lit(), *data)
    else:
        run.validate(Lit(), data[1], verbose=False)
    assert calibrated(ptq)["0"].scale == pytest.approx(input_scale(images(0 if fit else 1)), rel=1e-6)


class Late(LitClassifier):
    """Built in ``configure_model``."""

    guarded = True

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None or not self.guarded:
            torch.manual_seed(3)
            self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))


class Unguarded(Late):
    guarded = False


class InSetup(Unguarded):
    def configure_model(self) -> None:
        """Nothing is left to do."""

    def setup(self, stage: str) -> None:
        super().configure_model()


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
@pytest.mark.parametrize("kind", [Late, Unguarded, InSetup])
def test_a_model_built_in_a_hook(kind: type[Late], observer: str, tmp_path: Path) -> None:
    ptq = static(observer, target="net", output_dir=tmp_path)
    model = kind()
    trainer(callbacks=[ptq]).validate(model, images(1), verbose=False)
    assert set(calibrated(ptq)) == {"0", "2"}
    plain = copy.deepcopy(model.net).eval()
    expected = qaware.quantize(plain, ptq.recipe, images(1))
    assert calibrated(ptq) == expected.activations


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_calibrated(precision: str, tmp_path: Path) -> None:
    ptq = static(target="net", output_dir=tmp_path)
    trainer(callbacks=[ptq], precision=precision, max_epochs=1).fit(classifier(), images(), images(1))
    assert calibrated(ptq)["0"].scale == pytest.approx(input_scale(images()), rel=1e-2)


def test_double_precision_is_refused_before_anything_runs() -> None:
    for begin in ("fit", "validate"):
        with pytest.raises(QawareError, match=r"precision: '64-true' makes float64 weights"):
            getattr(trainer(callbacks=[static()], precision="64-true"), begin)(classifier(), images())


def test_inputs_in_half_precision_are_refused_before_training(tmp_path: Path) -> None:
    model = classifier()
    before = model.net[0].weight.detach().clone()
    qat = QuantizationAwareTraining("int8-dynamic", export=["tract"], target="net", output_dir=tmp_path)
    with pytest.raises(QawareError, match=r"is bfloat16, and artifacts take float32 inputs; use precision"):
        trainer(callbacks=[qat], precision="bf16-true", max_epochs=1).fit(model, images(), images(1))
    assert torch.equal(model.net[0].weight.float(), before.bfloat16().float())


def test_several_loaders_and_their_batches(tmp_path: Path) -> None:
    class Two(LitClassifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            self.net(batch[0])

    torch.manual_seed(0)
    ptq = static(target="net", output_dir=tmp_path, calibration_batches=2)
    trainer(callbacks=[ptq]).validate(Two(), [images(1), images(2, scale=3.0)], verbose=False)
    seen = input_scale(images(1), images(2, scale=3.0), count=2)
    assert calibrated(ptq)["0"].scale == pytest.approx(seen, rel=1e-6)


def test_calibration_draws_no_random_numbers_of_the_caller(tmp_path: Path) -> None:
    draws = []
    for calibration in (None, DataLoader(images(5).dataset, batch_size=16, shuffle=True)):
        ptq = static(output_dir=tmp_path / str(len(draws)), calibration=calibration)
        trainer(callbacks=[ptq]).fit(classifier(), images(), images(1))
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])


def test_calibration_takes_a_list_of_batches(tmp_path: Path) -> None:
    batches = list(images())
    found = []
    for calibration in (batches, images()):
        torch.manual_seed(0)
        ptq = PostTrainingQuantization("int8-static", "net", calibration=calibration)
        trainer(callbacks=[ptq]).validate(LitClassifier(), images(9), verbose=False)
        assert ptq.result is not None
        found.append(ptq.result.model.activations)
    assert found[0] == found[1]


def test_a_batch_that_the_step_does_not_take_says_what_to_give() -> None:
    ptq = PostTrainingQuantization("int8-static", "net", calibration=[{"x": torch.ones(4, 16)}])
    with pytest.raises(
        QawareError, match=r"calibration: validation_step failed on batch 0 .*give calibration="
    ):
        trainer(callbacks=[ptq]).validate(LitClassifier(), images(9), verbose=False)


def test_a_batch_of_another_shape_is_named_beside_what_the_model_takes(tmp_path: Path) -> None:
    good, bad = next(iter(images())), (torch.ones(4, 7), torch.zeros(4, dtype=torch.int64))
    ptq = PostTrainingQuantization("int8-static", "net", output_dir=tmp_path, calibration=[good, bad])
    words = r"failed on batch 1 \(the first is 0\).* shapes \(4, 7\), \(4,\), where it took \(2, 16\)"
    with pytest.raises(QawareError, match=words):
        trainer(callbacks=[ptq]).validate(LitClassifier(), images(9), verbose=False)


def test_fewer_calibration_batches_than_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = list(images())[:3]
    ptq = static(target="net", output_dir=tmp_path, calibration=few, calibration_batches=9)
    with pytest.raises(QawareError, match=r"^calibration_batches: 9 were asked for and the data has 3; give"):
        trainer(callbacks=[ptq]).validate(classifier(), images(1), verbose=False)
    with caplog.at_level("INFO"):
        ptq = static("histogram", target="net", output_dir=tmp_path, calibration=few)
        trainer(callbacks=[ptq]).validate(classifier(), images(1), verbose=False)
    assert sum("calibrated on 3 batches, all that there are" in line for line in caplog.messages) == 1


def test_layers_are_reported(tmp_path: Path) -> None:
    ptq = PostTrainingQuantization("int8-static", "net", output_dir=tmp_path)
    trainer(callbacks=[ptq]).validate(classifier(), images(1), verbose=False)
    assert ptq.result is not None
    assert ptq.result.layers is not None
    found = {layer.name: layer.output_sqnr for layer in ptq.result.layers.layers}
    assert set(found) == {"0", "2"}
    assert all(decibels is not None and 15 < decibels < 80 for decibels in found.values())
    data = json.loads((tmp_path / "int8-static-ptq.layers.json").read_text())
    assert data["layers"] == ptq.result.layers.to_dict()["layers"]
    assert "## Worst layers" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "int8-static-ptq.layers.md").exists()


def test_nothing_validated_is_nothing_quantized() -> None:
    ptq = PostTrainingQuantization("int8-weight-only", "net")
    trainer(callbacks=[ptq], limit_val_batches=0).validate(LitClassifier(), images(9), verbose=False)
    assert ptq.result is None


def test_what_cannot_be_scored_is_said_before_training() -> None:
    class Elsewhere(LitClassifier):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            """Never calls the model."""

    seen: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            seen.append(1)

    ptq = PostTrainingQuantization("int8-weight-only", "net")
    with pytest.raises(QawareError, match="was not called by validation_step"):
        trainer(callbacks=[ptq, Watch()]).fit(Elsewhere(), images(), images(9))
    assert seen == []


def test_no_validation_step_to_calibrate_with_is_said_before_training(tmp_path: Path) -> None:
    class Trained(LitClassifier):
        validation_step = None  # type: ignore[assignment]

    gptq = {"rounding": "gptq", "rules": [{"type": "Linear", "scheme": {"bits": 8}}]}
    for recipe in ("int8-static", gptq):
        model = Trained()
        before = copy.deepcopy(model.state_dict())
        ptq = PostTrainingQuantization(recipe, "net", score=False, output_dir=tmp_path)
        with pytest.raises(QawareError, match="through validation_step, and Trained has none"):
            trainer(callbacks=[ptq]).fit(model, images())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
