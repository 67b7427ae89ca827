"""The tract exporter: numbers of every recipe, what it refuses, and how a file or a process fails."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import SIGNATURE, TinyLM, quantize, tokens
from torch import nn
from tract_tools import EXPORTER, INT4, NOISE, RECIPES, convert, distance, everywhere, make, tiny

import qaware
from qaware.errors import QawareError, RuntimeDiedError
from qaware.exporters.artifact import Artifact
from qaware.exporters.check import check
from qaware.exporters.isolated import IsolatedRunner
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import compare
from qaware.recipe import Recipe


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_computes_what_its_integers_say(recipe: str, tie: bool) -> None:
    made = tiny(recipe, tie)
    parity = distance(made, *[(tokens(n, n),) for n in (1, 2, 17, 64)])
    assert parity.relative < NOISE
    assert parity.within(EXPORTER.tolerance)


@pytest.mark.parametrize("recipe", ["int8-dynamic-int4-weight", "int8-dynamic"])
def test_every_length(recipe: str) -> None:
    made = tiny(recipe)
    for length in range(1, 65):
        assert distance(made, (tokens(length, length),)).relative < NOISE, length


def test_reference_drops_only_the_rounding_of_activations() -> None:
    x = tokens(20)
    for recipe, changes in (("int4-weight-only", False), ("int8-dynamic", True), ("int8-static", True)):
        quantized = quantize(recipe)
        before = quantized.module(x)
        reference = EXPORTER.reference(quantized)
        assert torch.equal(reference(x), before) is not changes
        assert torch.equal(quantized.module(x), before)
        for name, weight in quantized.weights.items():
            layer = reference.get_submodule(name)
            assert torch.equal(layer.weight.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["int4-weight-only", "float16"])
def test_a_model_in_half_precision_runs_in_float32(tmp_path: Path, dtype: torch.dtype, recipe: str) -> None:
    made = make(convert(TinyLM().to(dtype), recipe), tmp_path / "a.nnef.tgz", SIGNATURE, tokens(5))
    assert distance(made, (tokens(33),)).relative < NOISE


def test_tolerance_sees_one_wrong_integer_and_a_lost_scale() -> None:
    made = tiny("int4-weight-only")
    for name, weight in made.quantized.weights.items():
        for wrong in (weight.data.clone(), weight.data):
            scale = weight.scale.clone()
            row = int(tokens(8)[0, 0]) if name == "embed" else 3
            if wrong is weight.data:
                scale[row, 1] *= 1.01
            else:
                wrong[row, 40] += 1 if wrong[row, 40] < 7 else -1
            other = EXPORTER.reference(made.quantized)
            value = dataclasses.replace(weight, data=wrong, scale=scale).dequantize()
            other.get_submodule(name).weight = nn.Parameter(value)
            assert not compare(made.run, other, [(tokens(8),)]).within(EXPORTER.tolerance), name


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ({"bits": 4, "group_size": 32}, "float32 scales"),
        ({**INT4, "symmetric": False}, "zero points"),
        ({**INT4, "group_size": 16}, "multiples of 32"),
        ({**INT4, "bits": 2, "group_size": 8}, "multiples of 32"),
    ],
    ids=str,
)
def test_refuses_what_would_be_rounded_and_names_a_legal_choice(scheme: dict, why: str) -> None:
    problems = check(Recipe.load(everywhere(scheme)).match(TinyLM()), [EXPORTER])
    assert {p.layer for p in problems} >= {"embed", "qkv", "lm_head"}
    assert all(why in p.message and p.nearest is not None for p in problems)
    decision = next(iter(Recipe.load(everywhere(scheme)).match(TinyLM()).quantized.values()))
    assert EXPORTER.refuse(dataclasses.replace(decision, scheme=problems[0].nearest)) is None


def test_refuses_a_width_that_fills_no_block() -> None:
    recipe = {"name": "all", "rules": [{"type": "Linear", "scheme": {**INT4, "group_size": 0}}]}
    problems = check(Recipe.load(recipe).match(nn.Sequential(nn.Linear(48, 64))), [EXPORTER])
    assert "48 input weights" in problems[0].message
    assert problems[0].nearest is not None
    assert problems[0].nearest.bits == 5


@pytest.mark.parametrize("name", RECIPES)
def test_accepts_every_named_recipe(name: str) -> None:
    assert check(Recipe.load(name).match(TinyLM()), [EXPORTER]) == []


def test_the_artifact_says_what_differs() -> None:
    artifact = Artifact.open(tiny("int8-dynamic").artifact.path)
    assert artifact.notes[0].startswith("activations in float32")
    assert artifact.layers["qkv"] == "int8 channel + int8-dynamic"


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "text", "absent"])
def test_a_file_that_is_no_archive_is_one_line(tmp_path: Path, damage: str) -> None:
    whole = tiny("int4-weight-only").artifact.path.read_bytes()
    noise = bytes(torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0)).tolist())
    data = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "noise": noise,
        "text": b"no archive\n" * 200,
    }
    path = tmp_path / "a.nnef.tgz"
    if damage in data:
        path.write_bytes(data[damage])
    with pytest.raises(QawareError, match=r"^a\.nnef\.tgz: tract cannot load it: ") as caught:
        EXPORTER.open(path, SIGNATURE)
    assert str(caught.value).isprintable()
    assert "backtrace" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_signature_of_another_model_is_refused() -> None:
    two = Signature((*SIGNATURE.inputs, TensorSpec("more", "float32", (1,))), SIGNATURE.symbols)
    with pytest.raises(QawareError, match="takes 1 inputs, its signature has 2"):
        EXPORTER.open(tiny("int4-weight-only").artifact.path, two)


def test_errors_while_running_are_one_line() -> None:
    with pytest.raises(
        QawareError, match="tract cannot run it: Input at index 0 has incorrect dtype"
    ) as caught:
        tiny("int4-weight-only").run(torch.zeros(1, 3))
    assert str(caught.value).isprintable()


def test_in_a_child_process_and_after_its_death() -> None:
    made = tiny("int8-dynamic-int4-weight")
    bad = torch.full((1, 3), 96)
    with IsolatedRunner(made.artifact) as runner:
        assert torch.equal(runner(tokens(7)), made.run(tokens(7)))
        with pytest.raises(QawareError, match="input_ids: value 96 is outside 0 to 95"):
            runner(bad)
        assert runner(tokens(64)).shape == (1, 64, 96)
        # What the check above is for: tract ends the process.
        open_range = Signature(
            (dataclasses.replace(SIGNATURE.inputs[0], low=None, high=None),), SIGNATURE.symbols
        )
        runner.artifact = dataclasses.replace(made.artifact, signature=open_range)
        with pytest.raises(RuntimeDiedError, match="SIG"):
            runner(bad)
    assert torch.isfinite(made.run(tokens(7))).all()


def test_static_layers_of_4_bits_need_no_q40_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = qaware.quantize(model, "int4-static", calibration=[x] * 2, calibration_batches=2)
    signature = Signature((TensorSpec("x", "float32", (4, 3, 8, 8)),), {})
    artifact = EXPORTER.export(made, (x,), signature, tmp_path / "net.nnef.tgz")
    run = EXPORTER.open(artifact.path, signature)
    torch.testing.assert_close(run(x), EXPORTER.reference(made)(x), atol=0.05, rtol=0)
