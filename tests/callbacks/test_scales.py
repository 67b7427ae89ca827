"""Learned scales under what else a Trainer does: optimizers made by hand, freezing, clipping, averages, and
learning rates and weights that ruin a scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging
from lit import LitLM, loader, trainer
from torch import nn

import qaware
from qaware import PostTrainingQuantization, QawareError, QuantizationAwareTraining, load_from_checkpoint
from qaware.engines.base import float_bytes
from qaware.engines.learned import grids
from qaware.recipe import Recipe

SCHEME = {"bits": 3, "group_size": 32, "symmetric": False, "scale_dtype": "float16"}
LAYERS = ("embed", "up", "down", "head")


def recipe(learning: str = "lsq", rounding: Any = "rtn", **scheme: Any) -> Recipe:
    rules = [
        {"role": "embedding", "scheme": {"bits": 8}},
        {"type": "Linear", "scheme": {**SCHEME, **scheme}},
    ]
    return Recipe.from_dict({"name": "r", "learning": learning, "rounding": rounding, "rules": rules})


def fit(qat: QuantizationAwareTraining, model: LitLM | None = None, *others: Any, **options: Any) -> LitLM:
    torch.manual_seed(0)
    model = model or LitLM()
    trainer(callbacks=[qat, *others], **options).fit(model, loader(), loader(9))
    return model


def require_exact(qat: QuantizationAwareTraining) -> None:
    assert qat.result is not None
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses


class ByName(LitLM):
    """The usual groups: no decay for what is no matrix, scales faster; or some parameters only."""

    def __init__(self, lr: float = 3e-2, only: str = "") -> None:
        super().__init__()
        self.gain_lr, self.only = lr, only

    def configure_optimizers(self) -> Any:
        named = {n: p for n, p in self.named_parameters() if self.only in n}
        scales = [p for n, p in named.items() if ".learned." in n]
        others = [p for n, p in named.items() if ".learned." not in n]
        groups = [{"params": others}, {"params": scales, "lr": self.gain_lr, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)


def test_names_for_groups_made_by_hand(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe(), output_dir=tmp_path)
    model = fit(qat, ByName())
    require_exact(qat)
    names = {n for n, _ in model.named_parameters() if ".learned." in n}
    assert names == {f"body.{layer}.weight_fake_quantizer.learned.gain" for layer in LAYERS}
    assert all(bool(grid.gain.ne(0).any()) for grid in grids(model))


@pytest.mark.parametrize("learning", ["lsq", "range"])
@pytest.mark.parametrize("lr", [1.0, 30.0])
def test_a_learning_rate_that_is_far_too_high(learning: str, lr: float, tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe(learning), output_dir=tmp_path)
    model: Any = fit(qat, ByName(lr=lr), max_epochs=8)
    require_exact(qat)
    for layer in LAYERS:
        scale = getattr(model.body, layer).weight_fake_quantizer.scale
        assert bool((scale.isfinite() & (scale > 0)).all())
    assert all(math.isfinite(loss) for loss in model.losses)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(algorithm: str, tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe("range"), output_dir=tmp_path)
    model = fit(qat, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    require_exact(qat)
    assert model.losses[-1] < model.losses[0]


def test_scales_that_no_optimizer_has_are_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    model = fit(QuantizationAwareTraining(recipe(), output_dir=tmp_path), ByName(only="up.weight"))
    named = "qaware: no optimizer has body.embed.weight_fake_quantizer.learned.gain and 2 more, so these"
    assert caplog.text.count(named) == 1
    assert [bool(grid.gain.ne(0).any()) for grid in grids(model)] == [False, True, False, False]
    caplog.clear()
    fit(QuantizationAwareTraining(recipe(), output_dir=tmp_path / "all"))
    assert "no optimizer has" not in caplog.text


def test_the_scale_of_a_frozen_weight_is_trained(tmp_path: Path) -> None:
    model: Any = LitLM()
    model.body.embed.weight.requires_grad_(False)
    before = model.body.embed.weight.clone()
    qat = QuantizationAwareTraining(recipe(), output_dir=tmp_path)
    fit(qat, model)
    require_exact(qat)
    assert torch.equal(model.body.embed.weight, before)
    assert bool(model.body.embed.weight_fake_quantizer.learned.gain.ne(0).any())


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body.embed)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body.embed, optimizer)


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_is_unfrozen_later(first: bool, tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe(), output_dir=tmp_path)
    torch.manual_seed(0)
    model: Any = LitLM()
    callbacks = [qat, Unfreezing()] if first else [Unfreezing(), qat]
    trainer(callbacks=callbacks).fit(model, loader(), loader(9))
    require_exact(qat)
    assert bool(model.body.embed.weight_fake_quantizer.learned.gain.ne(0).any())


class Zeroed(LitLM):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 5:
            nn.init.zeros_(self.body.up.weight)  # type: ignore[union-attr]


def test_a_weight_that_becomes_zero_grows_again(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe(symmetric=True), output_dir=tmp_path)
    model: Any = fit(qat, Zeroed())
    require_exact(qat)
    assert bool(model.body.up.weight.isfinite().all())
    assert bool(model.body.up.weight.ne(0).any())


def test_weights_below_the_smallest_scale(tmp_path: Path) -> None:
    model: Any = LitLM()
    with torch.no_grad():
        model.body.up.weight.mul_(1e-7)
    qat = QuantizationAwareTraining(recipe(symmetric=True), output_dir=tmp_path)
    fit(qat, model)
    require_exact(qat)
    assert float(model.body.up.weight_fake_quantizer.scale.min()) >= 2.0**-15


@pytest.mark.parametrize("first", [True, False])
def test_an_average_over_epochs(first: bool, tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe(), output_dir=tmp_path)
    average = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    torch.manual_seed(0)
    model: Any = LitLM()
    callbacks = [qat, average] if first else [average, qat]
    trainer(callbacks=callbacks, max_epochs=4).fit(model, loader(), loader(9))
    require_exact(qat)
    shipped = qat.result.model.weights["body.up"].dequantize()
    assert float((shipped - model.body.up.weight.detach()).abs().mean()) < 0.05


def test_a_second_fit_goes_on_and_plans_no_scales(tmp_path: Path) -> None:
    model = fit(QuantizationAwareTraining(recipe(), output_dir=tmp_path / "1"))
    base, gain = ([getattr(grid, k).clone() for grid in grids(model)] for k in ("base", "gain"))
    qat = QuantizationAwareTraining(recipe(), output_dir=tmp_path / "2")
    fit(qat, model)
    require_exact(qat)
    assert all(torch.equal(grid.base, b) for grid, b in zip(grids(model), base, strict=True))
    assert not any(torch.equal(grid.gain, g) for grid, g in zip(grids(model), gain, strict=True))
    assert qat.result is not None
    assert {d.type for d in qat.result.model.plan.decisions} == {"Embedding", "Linear"}


def test_a_checkpoint_from_before_start_step_loads_and_converts(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="early")
    early = QuantizationAwareTraining(recipe(), start_step=6, convert=False)
    fit(early, None, keep, enable_checkpointing=True, max_steps=3, max_epochs=-1)
    loaded = load_from_checkpoint(LitLM, tmp_path / "early.ckpt")
    assert not any(grid.known for grid in grids(loaded))
    weight = qaware.convert(loaded).weights["body.up"]
    assert float((weight.dequantize() - loaded.body.up.weight).abs().mean()) < 0.05  # type: ignore[union-attr]


def test_a_loaded_checkpoint_converts_to_the_same_integers(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(recipe(), output_dir=tmp_path / "out")
    fit(qat, None, ModelCheckpoint(tmp_path, filename="last"), enable_checkpointing=True)
    assert qat.result is not None
    expected, found = (
        model.weights
        for model in (qat.result.model, qaware.convert(load_from_checkpoint(LitLM, tmp_path / "last.ckpt")))
    )
    for name, weight in expected.items():
        assert torch.equal(found[name].data, weight.data)
        assert torch.equal(found[name].scale, weight.scale)


def test_float_training_is_not_resumed_with_scales(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="float")
    torch.manual_seed(0)
    trainer(callbacks=[keep], enable_checkpointing=True).fit(LitLM(), loader(), loader(9))
    qat = QuantizationAwareTraining(recipe(), convert=False)
    options: dict[str, Any] = {"max_epochs": 4}
    with pytest.raises(QawareError, match=r"^checkpoint: is of float training.*LitLM\.load_from_checkpoint"):
        trainer(callbacks=[qat], **options).fit(
            LitLM(), loader(), loader(9), ckpt_path=tmp_path / "float.ckpt"
        )
    plain = QuantizationAwareTraining(recipe("none"), convert=False)
    trainer(callbacks=[plain], **options).fit(LitLM(), loader(), loader(9), ckpt_path=tmp_path / "float.ckpt")


def test_a_checkpoint_without_scales_says_so(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="plain")
    fit(QuantizationAwareTraining(recipe("none"), convert=False), None, keep, enable_checkpointing=True)
    runner = trainer(callbacks=[QuantizationAwareTraining(recipe("lsq"), convert=False)])
    with pytest.raises(QawareError, match="learning 'none' there, 'lsq' here"):
        runner.fit(LitLM(), loader(), loader(9), ckpt_path=tmp_path / "plain.ckpt")


def test_without_a_trainer() -> None:
    torch.manual_seed(0)
    model: Any = qaware.prepare(LitLM(), recipe("range"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in loader():
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    batch = next(iter(loader(9)))
    with torch.no_grad():
        expected = model.eval()(ids=batch["ids"])["logits"]
        assert torch.equal(qaware.convert(model).module(ids=batch["ids"])["logits"], expected)
    assert all(bool(grid.gain.ne(0).any()) for grid in grids(model))


def test_scales_do_not_count_as_size() -> None:
    plain, model = LitLM(), LitLM()
    qaware.prepare(model, recipe("range"))
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in plain.parameters())
    assert float_bytes(model) == float_bytes(plain)


def test_rounding_is_for_ptq_and_said_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    steps = ["smoothquant", "gptq"]
    qat = QuantizationAwareTraining(recipe("none", steps), output_dir=tmp_path / "with")
    caplog.set_level("INFO")
    model = fit(qat)
    said = "qaware: rounding: smoothquant+gptq is for PTQ; QAT rounds to nearest as it trains"
    assert caplog.text.count(said) == 1
    require_exact(qat)
    caplog.clear()
    other = fit(QuantizationAwareTraining(recipe("none"), output_dir=tmp_path / "without"))
    assert "is for PTQ" not in caplog.text
    assert other.losses == model.losses


def test_ptq_has_no_use_for_learning(tmp_path: Path) -> None:
    found = []
    for learning in ("none", "range"):
        ptq = PostTrainingQuantization(recipe(learning), output_dir=tmp_path / learning)
        torch.manual_seed(0)
        trainer(callbacks=[ptq]).fit(LitLM(), loader(), loader(9))
        assert ptq.result is not None
        found.append(ptq.result.model)
    assert qaware.quantize(LitLM(), recipe("range")).weights.keys() == found[0].weights.keys()
    for name, weight in found[0].weights.items():
        assert torch.equal(found[1].weights[name].data, weight.data)
        assert torch.equal(found[1].weights[name].dequantize(), weight.dequantize())
