"""Precision plugins, agreement of integers and fake-quantization, and what is refused before training."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from qaware import QawareError

from .data import images, sequences
from .models import VOCAB, Classifier, LitLM
from .runs import INT4, STATIC, fake_quantized, integers, make, qat, trainer, validate


@pytest.mark.parametrize("recipe", [INT4, STATIC, "int8-weight-only"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_case_20_precision_plugins_train_and_convert(precision: str, recipe: str) -> None:
    """Lightning #21425, pytorch #42351 #51090: fake-quantizers broke on bfloat16. A run in each precision
    learns, converts, and its integers compute what was trained, under the same precision."""
    module, callback = make(), qat(recipe)
    trainer(callback, precision=precision).fit(module, sequences(), sequences(9))
    assert module.losses[-1] < module.losses[0]
    assert callback.result is not None
    converted = callback.result.model.module
    assert len(integers(converted)) == 4
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {dtype} == {p.dtype for p in converted.parameters()}
    assert validate(converted, precision=precision) == validate(module, precision=precision)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_case_20_classes_are_scored_in_any_precision(precision: str) -> None:
    """The inputs are floats here, which ``bf16-true`` converts before the step sees them."""
    module, callback = make(Classifier), qat(STATIC, target="net", score=True)
    trainer(callback, precision=precision).fit(module, images(), images(1))
    assert callback.result is not None
    scores = callback.result.scores
    assert scores["converted"].accuracy == scores["prepared"].accuracy
    assert scores["converted"].accuracy > 0.9


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_case_20_what_is_scored_is_what_was_trained(precision: str) -> None:
    """Prepared and converted are scored under one precision, so that their difference is the conversion's."""
    module, callback = make(), qat(STATIC, score=True)
    trainer(callback, precision=precision).fit(module, sequences(), sequences(9))
    assert callback.result is not None
    scores = callback.result.scores
    assert scores["converted"].losses == scores["prepared"].losses


def test_case_20_double_precision_is_refused() -> None:
    """Measured: torchao failed on float64 with an assertion in the first step. One sentence, before it."""
    module = make()
    with pytest.raises(QawareError, match=r"'64-true'.*float64.*use 32-true") as caught:
        trainer(qat(STATIC), precision="64-true").fit(module, sequences(), sequences(9))
    assert "\n" not in str(caught.value)
    assert module.losses == []
    assert fake_quantized(module) == set()


def test_case_20_double_weights_are_refused() -> None:
    """The same for a module that makes its own weights float64."""

    class Double(LitLM):
        def build(self) -> None:
            super().build()
            self.body.up.double()

    module = make(Double)
    with pytest.raises(QawareError, match=r"body\.up: weight is torch\.float64; quantization needs float32"):
        trainer(qat(STATIC)).fit(module, sequences(), sequences(9))
    assert module.losses == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("recipe", [INT4, STATIC, "int8-dynamic", "int4-weight-only", "float16"])
def test_case_34_integers_compute_what_training_saw(recipe: str, seed: int) -> None:
    """ao #2138: ranges that lag one step behind make integers of another model. After several optimizer steps
    the loss of the converted model is the prepared one's, on data that neither saw."""
    module, callback = make(seed=seed), qat(recipe)
    trainer(callback, max_epochs=1).fit(module, sequences(seed), sequences(9))
    assert callback.result is not None
    assert abs(validate(callback.result.model.module) - validate(module)) < 1e-6


@pytest.mark.parametrize("recipe", ["int8-dynamic", STATIC])
def test_case_07_batch_norm_trains_beside_fake_quantizers(recipe: str) -> None:
    """Lightning #12890 #12891: batch norm was folded before training and its statistics stood still. Its
    statistics move in training, stand still in validation, and the integers compute what was trained; where
    activations are integers it is folded into the layer before it, in the result only."""
    module, callback = make(Classifier), qat(recipe, target="net")
    norm = module.net[1]
    trainer(callback).fit(module, images(), images(1))
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == 12
    assert norm.running_mean.abs().max() > 0.05
    moved = norm.running_mean.clone()
    assert callback.result is not None
    converted = copy.deepcopy(module)
    converted.net = callback.result.model.module
    assert validate(converted, images(1)) == validate(module, images(1))
    assert norm.running_mean.equal(moved)
    shipped = callback.result.model.module[1]
    assert isinstance(shipped, nn.Identity if recipe == STATIC else nn.BatchNorm1d)


class Encoder(LitLM):
    """PyTorch's own encoder layer, whose fast path in evaluation reads the weights of its children."""

    def build(self) -> None:
        self.embed = nn.Embedding(VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(32, VOCAB)

    def forward(self, *, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.encoder(self.embed(ids)))}


def test_case_32_the_fast_path_of_transformer_layers_is_not_taken() -> None:
    """Measured: in evaluation without gradients the fused path skipped every fake-quantizer, and the
    converted layer did not run at all."""
    module, callback = make(Encoder), qat(STATIC, score=True)
    trainer(callback).fit(module, sequences(), sequences(9))
    batch = next(iter(sequences(9)))
    with torch.no_grad():
        fast = module.eval()(ids=batch["ids"])["logits"]
        slow = module.train()(ids=batch["ids"])["logits"]
        plain = make(Encoder)
        plain.load_state_dict(module.state_dict(), strict=False)
        apart = F.l1_loss(plain.eval()(ids=batch["ids"])["logits"], fast)
    assert torch.allclose(fast, slow, atol=1e-6)
    assert apart > 1e-3
    assert callback.result is not None
    assert validate(callback.result.model.module) == pytest.approx(validate(module), abs=1e-6)


def test_case_33_every_parameter_has_its_fate_and_its_reason() -> None:
    """Measured with GPT-2, whose layers are no ``nn.Linear``: only its head was quantized, unnoticed."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class Unusual(LitLM):
        def build(self) -> None:
            super().build()
            self.body.up = nn.Sequential(Conv1D(), nn.Linear(32, 64))

    module, callback = make(Unusual), qat(STATIC)
    trainer(callback).fit(module, sequences(), sequences(9))
    assert callback.result is not None
    plan = callback.result.plan
    fates = {d.parameter: d.reason for d in plan.decisions}
    trained = {n.replace("_fake_quantizer", "") for n, _ in module.named_parameters()}
    assert set(fates) == trained
    assert "no rule matches (type" in fates["body.up.0.weight"]
    assert "Conv1D 1,024" in plan.summary()


def test_case_33_a_group_that_does_not_divide_is_refused_before_training() -> None:
    """Measured: torchao says so without the layer's name. Every such layer, its width, and what would fit."""
    recipe = {"rules": [{"type": "Linear", "scheme": {"bits": 4, "group_size": 48}}]}
    module = make()
    with pytest.raises(QawareError, match=r"body\.up: group_size 48 does not divide its 32 .*body\.down: "):
        trainer(qat(recipe)).fit(module, sequences(), sequences(9))
    assert module.losses == []


@pytest.mark.parametrize("runtime", ["executorch", "tract"])
def test_case_41_a_missing_runtime_is_named_before_training(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning #19360, torchao's kernels: the missing package was found after hours of training."""
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == runtime else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    module = make()
    with pytest.raises(QawareError, match=rf"{runtime}.*pip install.*qaware\[{runtime}\]"):
        trainer(qat(INT4, export=[runtime])).fit(module, sequences(), sequences(9))
    assert module.losses == []


def test_case_41_a_missing_compiler_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTInductor needs a C++ compiler, which is no package."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "no-such-compiler")
    module = make()
    absent = inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with absent, pytest.raises(QawareError, match=r"aoti: no C\+\+ compiler was found; install g\+\+"):
        trainer(qat(INT4, export=["aoti"])).fit(module, sequences(), sequences(9))
    assert module.losses == []


def test_case_41_what_a_runtime_cannot_hold_is_named_before_training() -> None:
    """A scheme without a kernel on one of the runtimes: the layer, the value and the nearest choice."""
    module = make()
    with pytest.raises(QawareError, match=r"tract.*body\.up.*group"):
        trainer(
            qat({"rules": [{"type": "Linear", "scheme": {"bits": 4, "group_size": 16}}]}, export=["tract"])
        ).fit(module, sequences(), sequences(9))
    assert module.losses == []
