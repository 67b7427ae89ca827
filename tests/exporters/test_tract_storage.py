"""The integers and scales in a tract archive, bit for bit, and its size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import SIGNATURE, TinyLM, tokens
from torch import Tensor, nn
from tract_tools import (
    EXPORTER,
    INT4,
    NOISE,
    RECIPES,
    convert,
    distance,
    everywhere,
    make,
    same_integers,
    tiny,
)

from qaware.engines.base import float_bytes
from qaware.errors import QawareError
from qaware.exporters.isolated import IsolatedRunner
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import compare


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_file_holds_the_integers_of_the_engine(recipe: str, tie: bool) -> None:
    made = tiny(recipe, tie)
    weights = made.quantized.weights
    # One scale for the whole head is another grid than the embedding's, so those have integers of their own.
    shared = weights["lm_head"] is weights["embed"]
    assert shared is (tie and "per-tensor" not in recipe)
    for name, weight in weights.items():
        label = "module.embed.weight" if shared and name == "lm_head" else f"module.{name}.weight"
        assert same_integers(weight, made.files, label), name
    assert ("module.lm_head.weight.dat" in made.files) is not shared


@pytest.mark.parametrize(
    "scheme",
    [INT4, {**INT4, "group_size": 64}, {"bits": 8}, {"bits": 8, "group_size": 32, "symmetric": False}],
    ids=str,
)
def test_tract_reads_every_weight_bit_for_bit(tmp_path: Path, scheme: dict) -> None:
    linear, table = nn.Linear(128, 96, bias=False), nn.Embedding(96, 128)
    for layer, spec, example in (
        (linear, TensorSpec("x", "float32", ("n", 128)), torch.eye(128)),
        (table, TensorSpec("ids", "int64", ("n",), 0, 95), torch.arange(96)),
    ):
        model = nn.Sequential(layer)
        signature = Signature((spec,), {"n": (1, 128)})
        made = make(convert(model, everywhere(scheme)), tmp_path / "a.nnef.tgz", signature, example)
        got = made.run(example)
        assert torch.equal(got.T if layer is linear else got, made.quantized.weights["0"].dequantize())


@pytest.mark.parametrize(
    "scheme",
    [
        *[{**INT4, "bits": b} for b in (2, 3)],
        {**INT4, "group_size": 0},
        {**INT4, "scale_dtype": "float16"},
        {"bits": 5, "group_size": 16},
        {"bits": 6, "symmetric": False},
        {"bits": 7, "group_size": 8, "scale_dtype": "bfloat16"},
        {"bits": 8, "group_size": 16, "symmetric": False},
    ],
    ids=str,
)
def test_other_widths_and_groups(tmp_path: Path, scheme: dict) -> None:
    made = make(convert(TinyLM(), everywhere(scheme)), tmp_path / "a.nnef.tgz", SIGNATURE, tokens(5))
    assert all(EXPORTER.refuse(d) is None for d in made.quantized.plan.quantized.values())
    assert distance(made, (tokens(33),)).relative < NOISE
    for name, weight in made.quantized.weights.items():
        assert same_integers(weight, made.files, f"module.{name}.weight")


@pytest.mark.parametrize("scheme", [INT4, {"bits": 8, "symmetric": False}], ids=str)
@pytest.mark.parametrize("lead", [(), (3,), (3, 2)])
def test_a_classifier_on_features_of_any_rank(tmp_path: Path, scheme: dict, lead: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    signature = Signature((TensorSpec("x", "float32", ("n", *lead, 64)),), {"n": (1, 8)})
    quantized = convert(model, {"name": "all", "rules": [{"type": "Linear", "scheme": scheme}]})
    made = make(quantized, tmp_path / "a.nnef.tgz", signature, torch.randn(1, *lead, 64))
    assert distance(made, (torch.randn(5, *lead, 64),), (torch.randn(1, *lead, 64),)).relative < NOISE


def test_file_sizes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(256, 256), *[nn.Linear(256, 256) for _ in range(4)])
    signature = Signature((TensorSpec("ids", "int64", (1, "n"), 0, 255),), {"n": (1, 8)})
    shares = {}
    for name, scheme in {"int4": INT4, "int8": {"bits": 8}, "float16": {"bits": 16}}.items():
        made = make(
            convert(model, everywhere(scheme)),
            tmp_path / f"{name}.nnef.tgz",
            signature,
            torch.arange(4)[None],
        )
        shares[name] = made.artifact.bytes / float_bytes(model)
    assert 0.12 < shares["int4"] < 0.17
    assert 0.22 < shares["int8"] < 0.27
    assert 0.40 < shares["float16"] < 0.52


def test_scales_outside_float16_are_an_error_that_names_the_layer(tmp_path: Path) -> None:
    model = TinyLM()
    with torch.no_grad():
        model.gate_proj.weight[5] *= 1e-5
    with pytest.raises(
        QawareError, match=r"^gate_proj: .*scale .* not exact in the float16 of Q4_0 \(2 of 192"
    ):
        make(convert(model, "int4-weight-only"), tmp_path / "a.nnef.tgz", SIGNATURE, tokens(3))
    assert list(tmp_path.iterdir()) == []


def test_rows_of_zeros_are_exact_with_any_scale(tmp_path: Path) -> None:
    model = TinyLM()
    with torch.no_grad():
        model.embed.weight[0] = 0  # what padding_idx does
    made = make(convert(model, "int4-weight-only"), tmp_path / "a.nnef.tgz", SIGNATURE, tokens(3))
    assert float(made.quantized.weights["embed"].scale[0].max()) < 2**-24
    assert distance(made, (torch.zeros(1, 3, dtype=torch.int64),)).relative < NOISE


class Misuse(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
        self.how = how

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) @ self.how(self.out.weight).T


@pytest.mark.parametrize("how", [lambda w: w, lambda w: w * 2.0], ids=["transposed", "computed"])
def test_a_weight_that_cannot_stay_packed_is_an_error(
    tmp_path: Path, how: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(QawareError, match=r"^out: tract: the model uses this weight"):
        make(convert(Misuse(how), everywhere(INT4)), tmp_path / "a.nnef.tgz", SIGNATURE, tokens(3))


class Deadly(nn.Module):
    """Slices behind a packed table, and parts in front of packed layers: tract 0.23.9 moves them into the
    weight while it loads, and dies."""

    def __init__(self) -> None:
        super().__init__()
        self.sliced, self.table = nn.Embedding(96, 64), nn.Embedding(96, 64)
        self.beside, self.stacked, self.rotated = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        left, right = x.chunk(2, -1)
        heads = x.unflatten(-1, (2, 32)).transpose(1, 2)
        a, b = heads.chunk(2, -1)
        rotated = self.rotated(torch.cat([-b, a], -1).transpose(1, 2).flatten(2))
        stacked = self.stacked(torch.stack([left, right], -1).flatten(-2))
        return self.beside(torch.cat([right, left], -1)) + stacked + rotated + self.sliced(ids)[..., :1]


def test_tract_survives_slices_and_parts_around_packed_weights(tmp_path: Path) -> None:
    quantized = convert(Deadly(), everywhere(INT4))
    artifact = EXPORTER.export(quantized, (tokens(3),), SIGNATURE, tmp_path / "a.nnef.tgz")
    with IsolatedRunner(artifact) as runner:
        inputs = [(tokens(n),) for n in (1, 7, 64)]
        assert compare(runner, EXPORTER.reference(quantized), inputs).relative < NOISE
