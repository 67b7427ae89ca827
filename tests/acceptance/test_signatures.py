"""Any forward signature, any way of building a module, any part of it as the target."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qaware import QawareError
from qaware.callbacks.hooks import NAMES

from .data import images, sequences
from .models import (
    Body,
    BuiltInConfigureModel,
    BuiltInParts,
    BuiltInSetup,
    Classifier,
    LitLM,
)
from .runs import INT4, STATIC, fake_quantized, integers, make, qat, trainer, validate

BODY = {"body.embed", "body.up", "body.down", "body.head"}


@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_01_any_forward_signature(recipe: str) -> None:
    """Lightning #7926 #8677 #15862: forward with several inputs, keywords, LongTensor ids and a mask, out of
    a dict batch into a dict; no forward is replaced."""
    module, callback = make(), qat(recipe)
    run = trainer(callback)
    run.fit(module, sequences(), sequences(9))
    assert "forward" not in module.__dict__
    assert not any("forward" in m.__dict__ for m in module.modules())
    assert callback.result is not None
    converted = callback.result.model.module
    batch = next(iter(sequences(9)))
    args = {"ids": batch["ids"], "attention_mask": batch["mask"]}
    with torch.no_grad():
        assert converted(**args)["logits"].equal(module.eval()(**args)["logits"])
    assert validate(converted) == validate(module)
    predicted = [trainer().predict(m, sequences(9)) for m in (converted, module)]
    assert all(a.equal(b) for a, b in zip(*predicted, strict=True))


def test_case_01_the_mask_is_still_a_mask() -> None:
    """Lightning #15862: a second input is not swallowed on the way to the quantized model."""
    module, callback = make(), qat(STATIC)
    trainer(callback).fit(module, sequences(), sequences(9))
    assert callback.result is not None
    ids = next(iter(sequences(9)))["ids"]
    with torch.no_grad():
        whole, part = (
            callback.result.model.module(ids=ids, attention_mask=mask)["logits"]
            for mask in (torch.ones(ids.shape), torch.zeros(ids.shape))
        )
    assert not whole.equal(part)
    assert part.equal(part[:1, :1].expand_as(part)), "without ids every position is the same"


class Metric(nn.Module):
    """Stands for torchmetrics and loss modules: it has state and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.project = nn.Linear(4, 4)


class Parts(Classifier):
    """A backbone, a head and a metric with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
        self.head, self.metric = nn.Linear(32, 4), Metric()
        self.net = nn.Sequential()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.metric.total += 1
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.head(self.backbone(batch[0])), batch[1]))


def test_case_02_a_target_and_nothing_else() -> None:
    """Lightning #8068, PR #8069: quantize ``backbone`` only; head and metrics keep class and type."""
    module, callback = make(Parts), qat("int8-dynamic", target="backbone")
    untouched = copy.deepcopy(module.metric.project)
    trainer(callback).fit(module, images(), images(1))
    assert fake_quantized(module) == {"backbone.0", "backbone.2"}
    assert callback.result is not None
    assert integers(callback.result.model.module) == {"0.weight", "2.weight"}
    assert type(module.head) is nn.Linear
    assert type(module.head.weight) is nn.Parameter
    assert module.metric.project.weight.equal(untouched.weight)
    assert module.metric.total == 12


def test_case_02_patterns_that_stay_float() -> None:
    """Lightning #8068: rules by name, role and type choose layers; what they skip is bit-identical."""
    recipe = {
        "rules": [
            {"name": "*.head", "scheme": None},
            {"role": "embedding", "scheme": None},
            {"type": "Linear", "scheme": {"bits": 4, "group_size": 16}},
        ]
    }
    module, callback = make(), qat(recipe)
    trainer(callback).fit(module, sequences(), sequences(9))
    assert callback.result is not None
    converted = callback.result.model.module
    assert integers(converted) == {"body.up.weight", "body.down.weight"}
    for name in ("head", "embed"):
        ours, theirs = getattr(converted.body, name), getattr(module.body, name)
        assert type(ours) is type(theirs) in (nn.Linear, nn.Embedding)
        assert ours.weight.equal(theirs.weight)
    reasons = {d.parameter: d.reason for d in callback.result.plan.skipped}
    assert reasons["body.head.weight"] == "kept float by rule name=*.head"


@pytest.mark.parametrize("cls", [LitLM, BuiltInSetup, BuiltInConfigureModel, BuiltInParts])
@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_18_wherever_the_layers_are_built(cls: type[LitLM], recipe: str) -> None:
    """Lightning #18936 #19061: built in ``__init__``, ``setup``, ``configure_model``, or partly in each: all
    of it is quantized, before the optimizer exists, so that what trains is what ships."""
    module, callback = make(cls), qat(recipe)
    run = trainer(callback)
    run.fit(module, sequences(), sequences(9))
    names = (BODY - {"body.head"} | {"head"}) if cls is BuiltInParts else BODY
    assert fake_quantized(module) == names
    assert callback.result is not None
    assert integers(callback.result.model.module) == {f"{name}.weight" for name in names}
    assert module.losses[-1] < module.losses[0]
    assert validate(callback.result.model.module) == validate(module)


@pytest.mark.parametrize("cls", [LitLM, BuiltInSetup, BuiltInConfigureModel, BuiltInParts, Classifier])
@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_16_every_parameter_is_optimized_once(cls: type[Any], recipe: str) -> None:
    """Lightning 1.9 prepared after the optimizer was made. Every trainable parameter that the module has when
    training ends is in exactly one group, and got a gradient's step."""
    seen: list[list[int]] = []

    class Optimized(cls):
        def on_train_start(self) -> None:
            self.start = {n: p.detach().clone() for n, p in self.named_parameters()}

        def on_train_end(self) -> None:
            groups = self.optimizers().param_groups
            seen.append([id(p) for group in groups for p in group["params"]])

    train, target, recipe = (
        (images, "net", "int8-dynamic" if recipe == INT4 else recipe)
        if cls is Classifier
        else (sequences, None, recipe)
    )
    module = make(Optimized)
    trainer(qat(recipe, target=target)).fit(module, train(), train(9))
    assert sorted(seen[0]) == sorted(id(p) for p in module.parameters())
    assert len(seen[0]) == len(set(seen[0]))
    assert not [n for n, p in module.named_parameters() if p.equal(module.start[n])]


def test_an_empty_module_is_refused() -> None:
    """A module without any layer to quantize is one sentence, before training."""

    class Nothing(LitLM):
        def build(self) -> None:
            self.body = Body()
            for name in ("embed", "up", "down", "head"):
                kind = type(f"My{name}", (type(getattr(self.body, name)),), {})
                getattr(self.body, name).__class__ = kind

    module = make(Nothing)
    with pytest.raises(QawareError, match="quantizes nothing in this model"):
        trainer(qat()).fit(module, sequences(), sequences(9))
    assert module.losses == []
    assert not set(NAMES) & set(module.__dict__)
