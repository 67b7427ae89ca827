"""The LiteRT exporter: integers in the file, and the numbers of every scheme."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qaware
from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Runner
from qaware.exporters.check import check
from qaware.exporters.isolated import IsolatedRunner
from qaware.exporters.litert_flatbuffer import Flatbuffer
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import Parity, compare
from qaware.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SIGNATURE, TinyLM, quantize, tokens

EXPORTER = get_exporter("litert")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)
NOISE = 5e-7
"""Measured at most 2e-7; one int4 that is a step off is 3e-5."""
RECIPES = (
    *("int4-weight-only", "int8-weight-only", "int8-dynamic-int4-weight", "int8-dynamic", "int8-static"),
    *("int2-weight", "float16"),
)
ROUNDED = {"int8-dynamic-int4-weight", "int8-dynamic", "int2-weight"}
D8, D4 = {"bits": 8, "activation": "int8-dynamic"}, {"bits": 4, "activation": "int8-dynamic"}
BLOCK = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
IDS = Signature((TensorSpec("ids", "int64", ("n",), 0, 89),), {"n": (1, 90)})
TABLES = [
    *[BLOCK, {**BLOCK, "group_size": 96}, {"bits": 3}, {"bits": 8}, {"bits": 8, "group_size": 8}],
    *[{"bits": 2, "symmetric": False}, {"bits": 4, "symmetric": False, "group_size": 16}, {"bits": 16}],
]
WEIGHTS = [
    *[*TABLES, {**BLOCK, "activation": "int8-dynamic"}, {**BLOCK, **D4, "group_size": 64}],
    *[{**D4, "bits": bits} for bits in (1, 2, 5, 8)],
    {**BLOCK, "bits": 3, "levels": "stretched", "activation": "int8-dynamic"},
]


class Made(NamedTuple):
    quantized: QuantizedModel
    artifact: Artifact
    run: Runner

    @property
    def file(self) -> Flatbuffer:
        return Flatbuffer(self.artifact.path.read_bytes())


def operators(file: Flatbuffer) -> Counter[str]:
    return Counter(file.operator(op) for graph in file.model.subgraphs for op in graph.operators)


class Many(nn.Module):
    """A table for each of some schemes, and a layer for each of others."""

    def __init__(self, width: int, tables: int, layers: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(90, width) for _ in range(tables))
        self.layers = nn.ModuleList(nn.Linear(width, 20, bias=i % 2 == 0) for i in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        tables = [table(ids) for table in self.tables]
        return torch.cat([*tables, *(layer(tables[0]) for layer in self.layers)], -1)


def many(width: int, tables: list[dict[str, Any]], layers: list[dict[str, Any]]) -> QuantizedModel:
    rules = [{"name": f"tables.{i}", "scheme": scheme} for i, scheme in enumerate(tables)]
    rules += [{"name": f"layers.{i}", "scheme": scheme} for i, scheme in enumerate(layers)]
    return convert(Many(width, len(tables), len(layers)), rules)


def convert(model: nn.Module, rules: list[dict[str, Any]]) -> QuantizedModel:
    torch.manual_seed(0)
    work = copy.deepcopy(model).eval()
    plan = Recipe.load({"name": "all", "rules": rules}).match(work)
    assert not check(plan, [EXPORTER])
    engine = ModulesEngine()
    return engine.convert(engine.prepare(work, plan), plan)


def read(file: Flatbuffer, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scales and zero points of a weight, by nothing but the schema of the format."""
    (tensor,) = {
        t.buffer: t for g in file.model.subgraphs for t in g.tensors if t.name == f"{name}.weight".encode()
    }.values()
    raw = np.frombuffer(bytes(file.model.buffers[tensor.buffer].data), np.uint8)
    if tensor.type == file.schema.TensorType.INT4:
        raw = np.stack([raw & 15, raw >> 4], -1).reshape(-1)
        integers = (raw.astype(np.int16) ^ 8) - 8
    else:
        integers = raw.view(np.int8)
    found = tensor.quantization
    if found.details is None:
        return integers, np.array(found.scale, np.float32), np.array(found.zeroPoint)
    scales = next(g for g in file.model.subgraphs).tensors[found.details.scales]
    values = np.frombuffer(bytes(file.model.buffers[scales.buffer].data), np.float16).astype(np.float32)
    return integers, values, np.zeros(1)


def holds(made: Made, name: str) -> bool:
    weight = made.quantized.weights[name]
    integers, scale, zero = read(made.file, name)
    expected = weight.scale.numpy()
    if len(scale) != expected.size:  # wide groups are several blocks of one scale
        expected = np.repeat(expected, len(scale) // expected.size, -1)
    same = np.array_equal(integers[: weight.data.numel()], weight.data.reshape(-1).numpy())
    zeros = np.zeros(1) if weight.zero_point is None else weight.zero_point.reshape(-1).numpy()
    return same and np.array_equal(scale, expected.reshape(-1)) and bool((zero == zeros).all())


def make(quantized: QuantizedModel, path: Path, signature: Signature, example: Tensor) -> Made:
    artifact = EXPORTER.export(quantized, (example,), signature, path)
    return Made(quantized, artifact, EXPORTER.open(path, signature))


def distance(made: Made, *inputs: Tensor) -> Parity:
    reference = made.artifact.signature.wrap(EXPORTER.reference(made.quantized)).eval()
    return compare(made.run, reference, [(x,) for x in inputs])


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, held = tmp_path_factory.mktemp("litert"), {}

    def get(recipe: str) -> Made:
        if recipe not in held:
            held[recipe] = make(quantize(recipe), folder / f"{recipe}.tflite", SIGNATURE, tokens(1))
        return held[recipe]

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(exported: Any, recipe: str) -> None:
    made = exported(recipe)
    parity = distance(made, *[tokens(n, n) for n in (1, 2, 17, 64)])
    assert parity.within(EXPORTER.tolerance_for(made.quantized.plan))
    assert parity.relative < (0.01 if recipe in ROUNDED else NOISE)
    assert check(made.quantized.plan, [EXPORTER]) == []
    if recipe != "float16":
        assert all(holds(made, name) for name in made.quantized.weights)


def test_every_width_and_group(tmp_path: Path) -> None:
    made = make(many(192, TABLES, WEIGHTS), tmp_path / "a.tflite", IDS, torch.arange(3))
    for ids in (torch.arange(90), torch.arange(7, 8)):
        found, expected = made.run(ids), made.quantized.module(ids)
        # Without int8-dynamic activations, exact.
        exact = 192 * len(TABLES) + 20 * len(TABLES)
        assert torch.allclose(found[:, :exact], expected[:, :exact], rtol=1e-5, atol=1e-5)
        assert (found - expected)[:, exact:].abs().mean() < 0.01 * expected[:, exact:].std()
    floats = {name for name, weight in made.quantized.weights.items() if weight.scheme.is_float}
    assert all(holds(made, name) for name in made.quantized.weights if name not in floats)


def test_rows_that_end_within_a_byte(tmp_path: Path) -> None:
    schemes = [{"bits": 4}, {"bits": 4, "symmetric": False}]
    made = make(many(33, schemes, [*schemes, D4]), tmp_path / "a.tflite", IDS, torch.arange(3))
    found, expected = made.run(torch.arange(90)), made.quantized.module(torch.arange(90))
    assert torch.allclose(found[:, :-20], expected[:, :-20], rtol=1e-5, atol=1e-5)
    assert (found - expected).abs().mean() < 0.01
    assert all(holds(made, name) for name in made.quantized.weights)
    assert made.artifact.notes[0] == "weights take the width of their kernels: int4 as 8 bits"


def test_operators_compute_with_integers_where_they_can(exported: Any) -> None:
    assert operators(exported("int8-dynamic").file)["DEQUANTIZE"] == 0
    assert operators(exported("int8-dynamic-int4-weight").file)["DEQUANTIZE"] == 0
    # The embedding is looked up as it is.
    assert operators(exported("int8-weight-only").file)["DEQUANTIZE"] == 5
    note = "weights of layers without int8 activations are float32 once loaded"
    assert exported("int8-weight-only").artifact.notes == (note,)
    assert exported("int8-dynamic").artifact.notes == ()


def test_weights_are_stored_once(tmp_path: Path, exported: Any) -> None:
    tied = make(quantize("int4-weight-only", tie=True), tmp_path / "a.tflite", SIGNATURE, tokens(3))
    assert distance(tied, tokens(20)).relative < NOISE
    assert exported("int4-weight-only").artifact.bytes - tied.artifact.bytes > 96 * 64 / 2 - 500


class Shared(nn.Module):
    """A head that reads the table itself, two layers with equal weights, and factors around them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(90, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.b.weight = nn.Parameter(self.a.weight.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.a(self.embed(ids) * 8) * 0.25) * 3
        return F.linear(self.b(x) * 0.5, self.embed.weight)


def test_nothing_is_merged_into_integers(tmp_path: Path) -> None:
    rules = [{"name": name, "scheme": scheme} for name, scheme in (("embed", BLOCK), ("a", {"bits": 8}))]
    quantized = convert(Shared(), [*rules, {"name": "b", "scheme": D8}])
    made = make(quantized, tmp_path / "a.tflite", IDS, torch.arange(3))
    assert distance(made, torch.arange(90)).relative < 0.01
    assert all(holds(made, name) for name in quantized.weights)


def test_a_wrong_integer_and_a_lost_scale_are_beyond_the_tolerance(exported: Any) -> None:
    made = exported("int4-weight-only")
    tolerance = EXPORTER.tolerance_for(made.quantized.plan)
    weight = made.quantized.weights["qkv"]
    for row, column, factor in ((3, 40, 1.0), (3, 0, 1.01)):
        data, scale = weight.data.clone(), weight.scale.clone()
        if factor == 1.0:
            data[row, column] += 1 if data[row, column] < 7 else -1
        scale[row, 1] *= factor
        other = copy.deepcopy(made.quantized.module)
        value = QuantizedWeight(data, scale, None, weight.scheme).dequantize()
        other.qkv.weight = nn.Parameter(value)
        assert not compare(made.run, other, [(tokens(8),)]).within(tolerance)


def test_a_model_in_half_precision_runs_in_float32(tmp_path: Path) -> None:
    rules = [{"type": kind, "scheme": {"bits": 16}} for kind in ("Embedding", "Linear")]
    quantized = convert(TinyLM().to(torch.bfloat16), rules)
    made = make(quantized, tmp_path / "a.tflite", SIGNATURE, tokens(5))
    assert distance(made, tokens(33)).relative < NOISE
    assert made.artifact.bytes < 110_000


def test_batches_are_run_row_by_row(tmp_path: Path) -> None:
    spec = TensorSpec("ids", "int64", ("batch", "seq"), 0, 95)
    signature = Signature((spec,), {"batch": (1, 4), "seq": (1, 64)})
    made = make(quantize("int8-weight-only"), tmp_path / "a.tflite", signature, tokens(9))
    batch = torch.cat([tokens(20, seed) for seed in range(3)])
    assert made.run(batch).shape == (3, 20, 96)
    assert distance(made, batch, tokens(64)).relative < NOISE


def test_weight_only_convolutions(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 16, 3, groups=16), nn.Conv1d(16, 4, 2)
    )
    signature = Signature((TensorSpec("x", "float32", ("n", 8, 20)),), {"n": (1, 4)})
    schemes = {"0": {"bits": 8}, "2": {"bits": 4}, "3": {"bits": 4, "symmetric": False}}
    rules = [{"name": name, "scheme": scheme} for name, scheme in schemes.items()]
    quantized = qaware.quantize(model.eval(), {"name": "all", "rules": rules}, runtimes=["litert"])
    made = make(quantized, tmp_path / "a.tflite", signature, torch.randn(2, 8, 20))
    assert distance(made, torch.randn(3, 8, 20), torch.randn(1, 8, 20)).relative < NOISE
    assert operators(made.file)["DEQUANTIZE"] == 3


def test_in_a_child_process(exported: Any) -> None:
    made = exported("int8-dynamic-int4-weight")
    with IsolatedRunner(made.artifact) as runner:
        assert torch.equal(runner(tokens(7)), made.run(tokens(7)))
        with pytest.raises(QawareError, match="input_ids: value 96 is outside 0 to 95"):
            runner(torch.full((1, 3), 96))


def test_exporting_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantized = quantize("int8-static")
    before = {name: weight.data.clone() for name, weight in quantized.weights.items()}
    expected = quantized.module(tokens(9))

    def state() -> tuple[Any, ...]:
        filters = list(logging.getLogger().filters), list(logging.getLogger("torch").handlers)
        return filters, dict(os.environ), torch.is_grad_enabled()

    found = state()
    made = make(quantized, tmp_path / "a.tflite", SIGNATURE, tokens(3))
    assert state() == found
    assert capfd.readouterr() == ("", "")
    assert torch.equal(quantized.module(tokens(9)), expected)
    assert all(torch.equal(w.data, before[name]) for name, w in quantized.weights.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tflite", "a.tflite.json"]
    written = made.artifact.path.read_bytes()
    assert not [word for word in (b".py", str(tmp_path).encode(), b"Deployable") if word in written]
