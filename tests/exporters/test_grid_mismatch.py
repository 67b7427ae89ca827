"""A model that was made on one grid and leaves on another of the same width is stopped."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIGNATURE, TinyLM, quantize, tokens
from torch import nn

from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.errors import ParityError, QawareError
from qaware.exporters import get_exporter
from qaware.exporters.check import check, require_legal
from qaware.parity import compare
from qaware.recipe import Recipe

Q40 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
STRETCHED = {"bits": 2, "levels": "stretched", "group_size": 32, "scale_dtype": "bfloat16"}
INT2 = {"bits": 2, "group_size": 32, "scale_dtype": "bfloat16"}


def recipe(**scheme: Any) -> Recipe:
    return Recipe.from_dict({"name": "trained", "rules": [{"type": "Linear", "scheme": scheme}]})


def under(quantized: QuantizedModel, other: Recipe) -> QuantizedModel:
    """The integers of ``quantized`` with the plan of another recipe."""
    return dataclasses.replace(quantized, plan=other.match(TinyLM()))


def reread(weight: QuantizedWeight, **scheme: Any) -> QuantizedWeight:
    """The integers as if they were of another grid."""
    other = dataclasses.replace(weight.scheme, **scheme)
    return QuantizedWeight(weight.data, weight.scale, None if other.symmetric else weight.zero_point, other)


@pytest.mark.parametrize(
    ("made", "shipped", "said"),
    [
        ({**Q40, "symmetric": False}, Q40, "int4 g32 asym .*its plan is of int4 g32 "),
        ({**Q40, "group_size": 64}, Q40, "int4 g64 .*its plan is of int4 g32"),
        ({**Q40, "scale_dtype": "float16"}, Q40, r"\(float16 scales\).*\(bfloat16 scales\)"),
        (STRETCHED, INT2, "int2 stretched g32 .*its plan is of int2 g32"),
        (INT2, {**INT2, "levels": "ternary"}, "int2 g32 .*its plan is of ternary g32"),
    ],
)
@pytest.mark.parametrize("runtime", ["executorch", "aoti", "tract"])
def test_a_plan_of_another_grid_is_refused(
    made: dict[str, Any], shipped: dict[str, Any], said: str, runtime: str, tmp_path: Path
) -> None:
    rules = [{"name": n, "scheme": made} for n in ("qkv", "attn_out")]
    quantized = quantize({"name": "trained", "rules": rules})
    other = Recipe.from_dict({"name": "other", "rules": [{**rule, "scheme": shipped} for rule in rules]})
    with pytest.raises(QawareError, match=f"^qkv: was made on the grid {said}|^qkv: was made on.*{said}"):
        get_exporter(runtime).export(under(quantized, other), (tokens(8),), SIGNATURE, tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": torch.full((192, 64), 4, dtype=torch.int8)}, "integers from 4 to 4"),
        ({"data": torch.zeros(192, 64, dtype=torch.int8)}, "even integers"),
        ({"scale": torch.ones(192, 1)}, r"scales of shape \(192, 1\) instead of \(192, 2\)"),
        ({"zero_point": torch.zeros(192, 2, dtype=torch.int8)}, "has zero points"),
    ],
)
def test_integers_that_were_exchanged_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    quantized = quantize({"name": "r", "rules": [{"name": "qkv", "scheme": STRETCHED}]})
    quantized.weights["qkv"] = dataclasses.replace(quantized.weights["qkv"], **change)
    with pytest.raises(QawareError, match=f"^qkv: {said}|^qkv: has {said}"):
        get_exporter("aoti").export(quantized, (tokens(8),), SIGNATURE, tmp_path / "model.pt2")


def test_check_names_the_grid_before_anything_is_trained() -> None:
    made = recipe(**{**Q40, "symmetric": False}).match(TinyLM())
    (problem, *_) = check(made, [get_exporter("tract")])
    assert "int4 g32 asym has zero points, which Q4_0 has not" in str(problem)
    assert problem.nearest is not None
    assert problem.nearest.label == "int4 g32"
    with pytest.raises(QawareError, match="Q4_0"):
        require_legal(made, [get_exporter("tract")])


@pytest.mark.parametrize(
    ("made", "misread"),
    [
        ({**Q40, "symmetric": False}, {"symmetric": True}),
        (STRETCHED, {"levels": "all", "bits": 3}),
    ],
    ids=["zero points dropped", "stretched read as plain"],
)
def test_the_parity_gate_stops_what_was_forced(
    made: dict[str, Any], misread: dict[str, Any], tmp_path: Path
) -> None:
    """With the integers and the plan exchanged behind its back, the archive is one of another model."""
    exporter = get_exporter("tract")
    if exporter.missing():
        pytest.skip("tract is not installed")
    quantized = quantize({"name": "r", "rules": [{"name": "qkv", "scheme": made}]})
    forced = copy.copy(quantized)
    weight = reread(quantized.weights["qkv"], **misread)
    if "levels" in misread:  # read as integers of twice the width between them
        weight = dataclasses.replace(weight, scale=weight.scale * 2)
    forced.weights = {"qkv": weight}
    forced.plan = Recipe.from_dict(
        {"name": "r", "rules": [{"name": "qkv", "scheme": weight.scheme.to_dict()}]}
    ).match(TinyLM())
    artifact = exporter.export(forced, (tokens(8),), SIGNATURE, tmp_path / "model.nnef.tgz")
    reference = SIGNATURE.wrap(exporter.reference(quantized)).eval()
    runner = exporter.open(artifact.path, SIGNATURE)
    parity = compare(runner, reference, [(tokens(8, seed),) for seed in range(2)], [])
    with pytest.raises(ParityError):
        parity.require("model.nnef.tgz", exporter.tolerance_for(quantized.plan))


def test_the_right_grid_passes_the_same_gate(tmp_path: Path) -> None:
    exporter = get_exporter("tract")
    if exporter.missing():
        pytest.skip("tract is not installed")
    quantized = quantize({"name": "r", "rules": [{"name": "qkv", "scheme": STRETCHED}]})
    artifact = exporter.export(quantized, (tokens(8),), SIGNATURE, tmp_path / "model.nnef.tgz")
    runner = exporter.open(artifact.path, SIGNATURE)
    reference = SIGNATURE.wrap(exporter.reference(quantized)).eval()
    parity = compare(runner, reference, [(tokens(8, seed),) for seed in range(2)], [])
    parity.require("model.nnef.tgz", exporter.tolerance_for(quantized.plan))


def test_prepared_under_another_grid_names_both() -> None:
    from qaware.callbacks.state import require_same_recipe

    with pytest.raises(QawareError, match=r"type=Linear int2 stretched g32 there, type=Linear int2 g32 here"):
        require_same_recipe("checkpoint", recipe(**STRETCHED), None, recipe(**INT2), None)


def test_a_saved_model_keeps_its_grid(tmp_path: Path) -> None:
    from qaware.storage import load_quantized

    quantized = quantize({"name": "r", "rules": [{"name": "qkv", "scheme": STRETCHED}]})
    quantized.save(tmp_path / "model.pt")
    loaded = load_quantized(tmp_path / "model.pt", TinyLM())
    assert loaded.weights["qkv"].scheme == quantized.weights["qkv"].scheme
    with torch.no_grad():
        assert torch.equal(loaded.module(tokens(8)), quantized.module(tokens(8)))
    assert isinstance(loaded.module.get_submodule("qkv"), nn.Linear)
