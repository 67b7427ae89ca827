"""What leaves the Trainer: a converted module to export, to save, to load elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qaware
from qaware import PostTrainingQuantization

from .data import Resumable, images, sequences
from .models import Classifier, LitLM
from .runs import INT4, STATIC, integers, make, qat, trainer, validate

TESTS = Path(__file__).parents[1]


def quantized(recipe: str, cls: Any = LitLM) -> Any:
    callback = qat(recipe, target="net" if cls is Classifier else None)
    loaders = (images(), images(1)) if cls is Classifier else (sequences(), sequences(9))
    trainer(callback).fit(make(cls), *loaders)
    assert callback.result is not None
    return callback.result.model


class Positional(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor) -> Tensor:
        return self.module(ids=ids)["logits"]


@pytest.mark.parametrize("recipe", [INT4, STATIC, "int8-weight-only"])
def test_case_13_an_export_keeps_the_integers(recipe: str) -> None:
    """Lightning #7552, neural-compressor #1390, ao #1293: the exported model had forgotten that it was
    quantized. The exported program computes the same, and its state holds the same integers as int8."""
    model = quantized(recipe)
    ids = next(iter(sequences(9)))["ids"]
    program = torch.export.export(Positional(model.module).eval(), (ids,))
    with torch.no_grad():
        assert program.module()(ids).equal(model.module(ids=ids)["logits"])
    state = {n: getattr(v, "qdata", v) for n, v in program.state_dict.items()}
    held = {n: v for n, v in state.items() if isinstance(v, Tensor) and v.dtype == torch.int8}
    assert len(held) == len(model.weights) == 4
    for name, weight in model.weights.items():
        assert any(value.equal(weight.data) for value in held.values()), name


def test_case_14_the_converted_model_takes_the_same_inputs() -> None:
    """Lightning #8570 #10968: inputs had to be quantized by hand, inside a wrapper that raised. Floats in,
    floats out, in a plain ``nn.Module``."""
    model = quantized(STATIC, Classifier)
    inputs = next(iter(images(1)))[0]
    assert isinstance(model.module, nn.Sequential)
    output = model.module(inputs)
    assert output.dtype == torch.float32
    assert output.shape == (16, 4)


LOAD = """
import sys, torch, qaware
from acceptance.data import sequences
from acceptance.models import LitLM
torch.load(sys.argv[1], weights_only=True)
model = qaware.load_quantized(sys.argv[1], LitLM()).module
with torch.no_grad():
    torch.save(model(ids=next(iter(sequences(9)))["ids"])["logits"], sys.argv[2])
"""


def test_case_19_saved_integers_load_in_another_process(tmp_path: Path) -> None:
    """Lightning #19732 #19886 #20119, torchtune #2229, Model-Optimizer #180 #216: quantized checkpoints could
    not be loaded, or lost their structure. A file without code, the same outputs, bit for bit."""
    model = quantized(STATIC)
    path, answer = tmp_path / "model.qaware", tmp_path / "logits.pt"
    model.save(path)
    arguments = [sys.executable, "-c", LOAD, str(path), str(answer)]
    done = subprocess.run(arguments, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.module(ids=next(iter(sequences(9)))["ids"])["logits"]
    assert torch.load(answer, weights_only=True).equal(expected)


@pytest.mark.parametrize("recipe", [INT4, STATIC, "float16"])
def test_case_19_saved_integers_load_into_another_seed(recipe: str, tmp_path: Path) -> None:
    """The same for each kind of scheme; what is loaded validates as what was saved did."""
    model = quantized(recipe)
    model.save(tmp_path / "model.qaware")
    loaded = qaware.load_quantized(tmp_path / "model.qaware", make(seed=5))
    assert integers(loaded.module) == integers(model.module)
    assert validate(loaded.module) == validate(model.module)


class Pairs(Classifier):
    """A batch that is neither a dict nor a list of tensors, and a step that calls the net twice."""

    def validation_step(self, batch: list[Any], batch_idx: int) -> None:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs) + self.net(-inputs), labels)
        self.log("val_loss", loss)


@pytest.mark.parametrize("cls", [LitLM, Pairs])
def test_case_40_post_training_quantization_in_a_trainer(cls: Any) -> None:
    """Lightning #10793 #16085: post-training quantization through the user's own validation step, whatever
    its batch is. The integers compute what fake-quantization with the same ranges does; the module stays
    float."""
    lm = cls is LitLM
    train, target = (sequences, None) if lm else (images, "net")
    module = make(cls)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    ptq = PostTrainingQuantization(STATIC, target=target, calibration=train(), score=lm, engine="modules")
    trainer(ptq).validate(module, train(9), verbose=False)
    assert ptq.result is not None
    assert all(v.equal(before[n]) for n, v in module.state_dict().items())
    assert set(module.state_dict()) == set(before)
    prepared = qaware.prepare(make(cls), STATIC, target=target)
    for name, layer in prepared.named_modules():
        key = name.removeprefix("net.")
        if hasattr(layer, "weight_fake_quantizer") and key in ptq.result.model.activations:
            observer = layer.activation_fake_quantizer.observer
            seen = ranges(module, name, train())
            observer.min_val.copy_(seen[0])
            observer.max_val.copy_(seen[1])
    expected = validate(prepared, train(9))
    converted = make(cls)
    if lm:
        converted = ptq.result.model.module
    else:
        converted.net = ptq.result.model.module
    assert validate(converted, train(9)) == pytest.approx(expected, abs=1e-6)
    assert expected != validate(module, train(9))


def ranges(module: Any, name: str, loader: Resumable) -> tuple[Tensor, Tensor]:
    """Of what enters a layer of the float model while it is validated: what calibration must have found."""
    seen: list[Tensor] = []
    layer = module.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    validate(module, loader)
    handle.remove()
    return torch.stack([t.min() for t in seen]).min(), torch.stack([t.max() for t in seen]).max()
