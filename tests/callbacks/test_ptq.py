"""PostTrainingQuantization inside real Trainers, and the exports of both callbacks."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lit import LitClassifier, LitLM, images, loader, trainer

from qaware import ParityError, PostTrainingQuantization, QawareError, QuantizationAwareTraining
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
    assert len(seen) == 4 + 2


def test_static_recipe_without_data_to_observe(tmp_path: Path) -> None:
    ptq = PostTrainingQuantization("int8-static", target="net", output_dir=tmp_path)
    with pytest.raises(QawareError, match="calibration: recipe 'int8-static' has static activations"):
        trainer(callbacks=[ptq]).validate(LitClassifier(), images(1), verbose=False)


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
    with pytest.raises(QawareError, match="export: needs one batch of inputs"):
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
