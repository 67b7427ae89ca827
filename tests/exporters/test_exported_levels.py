"""Registered sets of levels on the runtimes: the integers in the files are those of the engine, and what
cannot be held is refused with a choice that can."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from registered_levels import POWERS, SCHEMES
from tiny import SIGNATURE, TinyLM, quantize, tokens

import qaware
from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters import get_exporter
from qaware.exporters.aoti_layers import BlockedWeight
from qaware.exporters.base import Exporter
from qaware.exporters.check import check
from qaware.exporters.onnx_layers import BlockWeight
from qaware.exporters.openvino_layers import PlainWeight
from qaware.exporters.packed import PackedWeight
from qaware.parity import compare
from qaware.recipe import Recipe
from qaware.scheme import Scheme

each = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.levels)
DYNAMIC = "int8-dynamic"


def recipe(scheme: Scheme) -> dict[str, Any]:
    linear, table = {"type": "Linear", "scheme": scheme.to_dict()}, {"type": "Embedding"}
    return {"name": "levels", "rules": [linear, {**table, "scheme": scheme.weight.to_dict()}]}


def exporter(name: str) -> Exporter:
    found = get_exporter(name)
    if why := found.missing():
        pytest.skip(why)
    return found


def export(runtime: Exporter, quantized: QuantizedModel, folder: Path) -> Path:
    """The file, once it was found to compute what it should."""
    path = folder / f"levels{runtime.suffix}"
    runtime.export(quantized, (tokens(8),), SIGNATURE, path)
    reference = SIGNATURE.wrap(runtime.reference(quantized)).eval()
    inputs = [(tokens(length, length),) for length in (1, 7, 64)]
    parity = compare(runtime.open(path, SIGNATURE), reference, inputs)
    parity.require(path.name, runtime.tolerance_for(quantized.plan))
    return path


@each
@pytest.mark.parametrize("tie", [False, True])
def test_tract_holds_the_integers(scheme: Scheme, tie: bool, tmp_path: Path) -> None:
    runtime = exporter("tract")
    from tract_tools import make, same_integers

    quantized = quantize(recipe(scheme), tie)
    made = make(quantized, tmp_path / f"levels{runtime.suffix}", SIGNATURE, tokens(1))
    reference = SIGNATURE.wrap(runtime.reference(quantized)).eval()
    compare(made.run, reference, [(tokens(9),)]).require("levels", runtime.tolerance_for(quantized.plan))
    labels = {name.removesuffix(".dat") for name in made.files if name.endswith(".dat")}
    for name, weight in quantized.weights.items():
        shared = [n for n, w in quantized.weights.items() if w is weight]
        (label,) = {f"module.{n}.weight" for n in shared} & labels or {f"{n}.weight" for n in shared} & labels
        assert same_integers(weight, made.files, label), name


@each
def test_executorch_holds_the_integers(scheme: Scheme, tmp_path: Path) -> None:
    """FP4's in the kernels of 8 bits, which have one scale for each channel."""
    runtime = exporter("executorch")
    from test_executorch import Made, missing_linears

    group = 32 if scheme.stored_bits <= 4 else 0
    quantized = quantize(recipe(dataclasses.replace(scheme, group_size=group, activation=DYNAMIC)))
    path = export(runtime, quantized, tmp_path)
    made: Any = Made(quantized, qaware.exporters.artifact.Artifact.open(path), None)  # type: ignore[arg-type]
    weights = {n: w for n, w in quantized.weights.items() if n != "embed"}
    assert missing_linears(weights, made, tmp_path) == []


@each
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_others_compute_what_the_integers_say(scheme: Scheme, name: str, tmp_path: Path) -> None:
    export(exporter(name), quantize(recipe(scheme)), tmp_path)


@each
@pytest.mark.parametrize("kind", [PackedWeight, BlockedWeight, BlockWeight, PlainWeight])
def test_every_form_of_a_weight_gives_the_integers_back(scheme: Scheme, kind: Any) -> None:
    for weight in quantize(recipe(scheme)).weights.values():
        if kind is BlockedWeight and scheme.stored_bits > 4:
            continue  # no kernel of 5 bits: these are in planes
        held = kind(weight)
        assert torch.equal(held.integers(), weight.data)
        if kind is not BlockWeight:  # whose operator does it
            assert torch.equal(held.dequantize(), weight.dequantize())
        assert torch.equal(held.grid()[0], weight.scale)


def test_what_xnnpack_has_no_kernel_for_is_refused_with_the_nearest() -> None:
    fp4 = dataclasses.replace(SCHEMES[0], activation=DYNAMIC)
    problem = check(Recipe.load(recipe(fp4)).match(TinyLM()), [get_exporter("executorch")])[-1]
    assert "test-fp4 has integers of 5 bits; int8 linear layers have one scale per channel" in str(problem)
    assert problem.nearest == dataclasses.replace(fp4, group_size=0)


def test_signed_rounding_is_refused_where_a_scale_below_zero_is_another_grid() -> None:
    runtime = get_exporter("executorch")
    for scheme, refused in zip(SCHEMES, (False, True), strict=True):
        rules = recipe(dataclasses.replace(scheme, group_size=0, activation=DYNAMIC))
        plan = Recipe.load({**rules, "rounding": {"mse": {"signed": True}}}).match(TinyLM())
        assert (runtime.refuse_plan(plan) is not None) == refused


def test_integers_that_are_no_levels_do_not_leave(tmp_path: Path) -> None:
    quantized = quantize(recipe(SCHEMES[1]))
    assert 3 not in POWERS
    quantized.weights["qkv"].data[0, 0] = 3
    with pytest.raises(
        QawareError, match="qkv: has integers such as 3, which is not on the grid test-powers"
    ):
        get_exporter("aoti").export(quantized, (tokens(8),), SIGNATURE, tmp_path / "x.pt2")
