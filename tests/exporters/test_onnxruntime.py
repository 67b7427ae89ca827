"""The ONNX Runtime exporter: integers in the file, numbers of every scheme, int8 networks, generation."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
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
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import Parity, compare
from qaware.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import generating_lm as lm
import static_net
from tiny import SIGNATURE, TinyLM, quantize, tokens

EXPORTER = get_exporter("onnxruntime")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)
NOISE = 5e-7
"""Measured at most 2e-7; one int4 that is a step off is 3e-5."""
RECIPES = (
    *("int4-weight-only", "int8-weight-only", "int8-dynamic-int4-weight", "int8-dynamic", "int8-static"),
    *("int8-static-per-tensor", "int2-weight", "int3-weight", "ternary-weight", "float16"),
)
LEVEL4 = "accuracy_level 4: activations are rounded to int8 for each block of a token, symmetrically"
INT4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
SCHEMES = [
    *[{**INT4, "bits": bits} for bits in (1, 2, 3, 4, 6, 8)],
    *[{"bits": bits, "symmetric": False, "group_size": group} for bits, group in ((2, 0), (4, 16), (8, 0))],
    *[{"bits": bits, "levels": "stretched", "group_size": 32} for bits in (1, 3)],
    {"bits": 2, "levels": "ternary", "group_size": 16, "scale_dtype": "float16"},
    {**INT4, "group_size": 48},
    {"bits": 8, "group_size": 8, "symmetric": False},
]


class Made(NamedTuple):
    quantized: QuantizedModel
    artifact: Artifact
    run: Runner
    graph: Any

    @property
    def operators(self) -> Counter[str]:
        return Counter(node.op_type for node in self.graph.node)


def make(
    quantized: QuantizedModel, path: Path, signature: Signature, example: Tensor, **options: Any
) -> Made:
    import onnx

    exporter = get_exporter({"onnxruntime": options})
    artifact = exporter.export(quantized, (example,), signature, path)
    return Made(quantized, artifact, exporter.open(path, signature), onnx.load(str(path)).graph)


def convert(model: nn.Module, scheme: dict[str, Any]) -> QuantizedModel:
    rules = [{"type": t, "scheme": scheme} for t in ("Embedding", "Linear")]
    work = copy.deepcopy(model).eval()
    plan = Recipe.load({"name": "all", "rules": rules}).match(work)
    engine = ModulesEngine()
    return engine.convert(engine.prepare(work, plan), plan)


def distance(made: Made, *inputs: Tensor) -> Parity:
    reference = made.artifact.signature.wrap(EXPORTER.reference(made.quantized)).eval()
    return compare(made.run, reference, [(x,) for x in inputs])


def arrays(graph: Any) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """Integers of the last axis, the first in the lowest bits, as ONNX Runtime's operators are documented."""
    parts = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*data.shape[:-1], -1).astype(np.int16)


def same_integers(weight: QuantizedWeight, stored: dict[str, np.ndarray], name: str) -> bool:
    rows, width = weight.data.shape
    codes = stored[f"module.{name}.packed.codes"].reshape(rows, -1)
    bits = next(b for b in (2, 4, 8) if weight.scheme.stored_bits <= b)
    middle = 2 ** (bits - 1)
    integers = unpacked(codes, bits)[:, :width] - middle
    scale = stored[f"module.{name}.packed.scale"].astype(np.float32)
    same = np.array_equal(integers, weight.data.numpy()) and np.array_equal(scale, weight.scale.numpy())
    if weight.zero_point is None:
        return same and f"module.{name}.packed.zero_point" not in stored
    zeros = unpacked(stored[f"module.{name}.packed.zero_point"], bits) - middle
    blocks, groups = stored[f"module.{name}.packed.codes"].shape[1], scale.shape[1]
    return same and np.array_equal(zeros[:, : blocks : blocks // groups], weight.zero_point.numpy())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, held = tmp_path_factory.mktemp("onnx"), {}

    def get(recipe: str) -> Made:
        if recipe not in held:
            # The shortest legal example: the exporter has to build one that it can trace.
            held[recipe] = make(quantize(recipe), folder / f"{recipe}.onnx", SIGNATURE, tokens(1))
        return held[recipe]

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(exported: Any, recipe: str) -> None:
    made = exported(recipe)
    parity = distance(made, *[tokens(n, n) for n in (1, 2, 17, 64)])
    assert parity.within(EXPORTER.tolerance_for(made.quantized.plan))
    assert parity.relative < (0.02 if made.artifact.notes[:1] == (LEVEL4,) else NOISE)
    assert check(made.quantized.plan, [EXPORTER]) == []


@pytest.mark.parametrize("recipe", ["int4-weight-only", "int8-dynamic", "int2-weight"])
def test_the_file_holds_the_integers_and_scales_of_the_engine(exported: Any, recipe: str) -> None:
    made = exported(recipe)
    stored = arrays(made.graph)
    assert made.operators["MatMulNBits"] == 5
    assert all(same_integers(w, stored, name) for name, w in made.quantized.weights.items())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_width_and_group(tmp_path: Path, scheme: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(90, 96), nn.Linear(96, 40))
    signature = Signature((TensorSpec("ids", "int64", (1, "n"), 0, 89),), {"n": (1, 90)})
    made = make(convert(model, scheme), tmp_path / "a.onnx", signature, torch.arange(3)[None])
    assert distance(made, torch.arange(90)[None], torch.arange(7, 8)[None]).relative < NOISE
    if scheme["group_size"] != 8:  # no block is as small, so this one is expanded while it loads
        assert made.operators["MatMulNBits"] == made.operators["GatherBlockQuantized"] == 1
        stored = arrays(made.graph)
        assert all(same_integers(w, stored, name) for name, w in made.quantized.weights.items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_that_fills_no_block(tmp_path: Path, bits: int, symmetric: bool) -> None:
    model = nn.Sequential(nn.Embedding(90, 50), nn.Linear(50, 40, bias=False))
    signature = Signature((TensorSpec("ids", "int64", ("n",), 0, 89),), {"n": (1, 90)})
    quantized = convert(model, {"bits": bits, "symmetric": symmetric})
    made = make(quantized, tmp_path / "a.onnx", signature, torch.arange(3))
    assert distance(made, torch.arange(90), torch.arange(1)).relative < NOISE
    assert made.operators["MatMulNBits"] == made.operators["GatherBlockQuantized"] == 1


def test_tied_weights_are_stored_once(tmp_path: Path, exported: Any) -> None:
    tied = make(quantize("int4-weight-only", tie=True), tmp_path / "a.onnx", SIGNATURE, tokens(3))
    assert distance(tied, tokens(20)).relative < NOISE
    untied = exported("int4-weight-only").artifact.bytes
    assert untied - tied.artifact.bytes > 96 * 64 / 2


def test_a_wrong_integer_and_a_lost_scale_are_beyond_the_tolerance(exported: Any) -> None:
    made = exported("int4-weight-only")
    tolerance = EXPORTER.tolerance_for(made.quantized.plan)
    for name in ("qkv", "lm_head"):
        weight = made.quantized.weights[name]
        for row, column, factor in ((3, 40, 1.0), (3, 0, 1.01)):
            data, scale = weight.data.clone(), weight.scale.clone()
            if factor == 1.0:
                data[row, column] += 1 if data[row, column] < 7 else -1
            scale[row, 1] *= factor
            other = copy.deepcopy(made.quantized.module)
            value = QuantizedWeight(data, scale, None, weight.scheme).dequantize()
            other.get_submodule(name).weight = nn.Parameter(value)
            assert not compare(made.run, other, [(tokens(8),)]).within(tolerance), name


def test_the_accuracy_level_follows_the_scheme(tmp_path: Path, exported: Any) -> None:
    def levels(graph: Any) -> set[int]:
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        return {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}

    assert levels(exported("int8-dynamic-int4-weight").graph) == {4}
    assert exported("int8-dynamic-int4-weight").artifact.notes == (LEVEL4,)
    assert levels(exported("int4-weight-only").graph) == {0}
    fast = make(quantize("int4-weight-only"), tmp_path / "a.onnx", SIGNATURE, tokens(3), accuracy_level=4)
    assert levels(fast.graph) == {4}
    exporter = get_exporter({"onnxruntime": {"accuracy_level": 4}})
    parity = distance(fast, tokens(50))
    assert NOISE < parity.relative < 0.02
    assert parity.within(exporter.tolerance_for(fast.quantized.plan))
    for wrong in (5, 4.0, True, [4]):
        with pytest.raises(QawareError, match=r"accuracy_level: .* is not one of 0, 1, 2, 3, 4"):
            get_exporter({"onnxruntime": {"accuracy_level": wrong}})


@pytest.mark.parametrize("per_tensor", [False, True])
def test_an_int8_network_is_the_one_that_was_converted(tmp_path: Path, per_tensor: bool) -> None:
    recipe = "int8-static-per-tensor" if per_tensor else "int8-static"
    model, batches = static_net.StaticNet().eval(), [static_net.images(2, seed) for seed in range(4)]
    quantized = qaware.quantize(model, recipe, batches, runtimes=["onnxruntime"])
    made = make(quantized, tmp_path / "a.onnx", static_net.SIGNATURE, static_net.images(1))
    assert static_net.steps(made.run, quantized) == (0.0, 0.0)
    assert EXPORTER.tolerance_for(quantized.plan).steps == 1
    stored = arrays(made.graph)
    for name, weight in quantized.weights.items():
        assert np.array_equal(stored[f"module.{name}.weight"].reshape(weight.data.shape), weight.data.numpy())


def test_onnx_runtime_multiplies_integers_everywhere(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    path = tmp_path / "a.onnx"
    made = make(static_net.static_net(), path, static_net.SIGNATURE, static_net.images(1))
    assert static_net.steps(made.run, made.quantized)[0] <= 1
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 4
    onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in onnx.load(str(tmp_path / "fused.onnx")).graph.node)
    assert (fused["QLinearConv"], fused["QGemm"], fused["QLinearAdd"], fused["QLinearConcat"]) == (5, 1, 1, 1)
    assert not {"Conv", "Gemm", "MatMul", "Add", "MaxPool"} & set(fused)


def test_a_graph_made_for_another_runtime(tmp_path: Path) -> None:
    model, batches = static_net.StaticNet().eval(), [static_net.images(2, seed) for seed in range(2)]
    if get_exporter("executorch").missing():
        pytest.skip(str(get_exporter("executorch").missing()))
    quantized = qaware.quantize(model, "int8-static", batches, runtimes=["executorch"], engine="graph")
    made = make(quantized, tmp_path / "a.onnx", static_net.SIGNATURE, static_net.images(1))
    reference = static_net.SIGNATURE.wrap(EXPORTER.reference(quantized)).eval()
    inputs = [(static_net.images(n, n),) for n in static_net.BATCHES]
    parity = compare(made.run, reference, inputs, quantized.outputs.values())
    assert parity.within(EXPORTER.tolerance_for(quantized.plan))


@pytest.mark.parametrize("scheme", [{"bits": 8}, {"bits": 4, "symmetric": False}], ids=str)
def test_weight_only_convolutions(tmp_path: Path, scheme: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 4, 3, bias=False)).eval()
    signature = Signature((TensorSpec("x", "float32", ("n", 8, 20)),), {"n": (1, 4)})
    recipe = {"name": "all", "rules": [{"type": "Conv1d", "scheme": scheme}]}
    quantized = qaware.quantize(model, recipe, runtimes=["onnxruntime"])
    made = make(quantized, tmp_path / "a.onnx", signature, torch.randn(2, 8, 20))
    assert distance(made, torch.randn(3, 8, 20), torch.randn(1, 8, 20)).relative < NOISE
    assert not [a for a in arrays(made.graph).values() if a.dtype == np.float32 and a.size >= 16 * 8 * 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [INT4, {"bits": 16}], ids=str)
def test_a_model_in_half_precision_runs_in_float32(
    tmp_path: Path, dtype: torch.dtype, scheme: dict[str, Any]
) -> None:
    made = make(convert(TinyLM().to(dtype), scheme), tmp_path / "a.onnx", SIGNATURE, tokens(5))
    assert distance(made, tokens(33)).relative < NOISE
    assert made.artifact.bytes < (50_000 if scheme is INT4 else 100_000)


@pytest.mark.parametrize("recipe", ["int4-weight-only", "int8-dynamic"])
def test_generation(tmp_path: Path, recipe: str) -> None:
    quantized = lm.quantized(recipe, "onnxruntime")
    artifact = lm.export(EXPORTER, quantized, tmp_path)
    lm.require_generation(EXPORTER, quantized, artifact)
    runner: Any = EXPORTER.open(artifact.path, lm.SIGNATURE)
    runner(lm.text(3))
    with pytest.raises(QawareError, match="step at 9, but only 3 tokens were given"):
        runner.step(lm.text(1), 9)


def test_inputs_and_outputs_have_the_names_that_others_look_for(tmp_path: Path) -> None:
    import onnx

    artifact = lm.export(EXPORTER, lm.quantized("int8-weight-only", "onnxruntime"), tmp_path)
    graph = onnx.load(str(artifact.path)).graph
    past = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert [i.name for i in graph.input] == ["input_ids", *past]
    present = [name.replace("past_key_values", "present") for name in past]
    assert [o.name for o in graph.output] == ["logits", *present]
    axes = {axis.dim_param for value in graph.input for axis in value.type.tensor_type.shape.dim}
    assert axes == {"", lm.SIGNATURE.inputs[0].shape[1], "past"}


@pytest.mark.parametrize(
    ("scheme", "why"),
    [({"group_size": 32}, "one scale per channel"), ({"symmetric": False}, "no zero points in ONNX Runtime")],
    ids=str,
)
def test_refuses_what_int8_products_have_not(scheme: dict[str, Any], why: str) -> None:
    scheme = {"bits": 8, "activation": "int8-static", **scheme}
    plan = Recipe.load({"name": "all", "rules": [{"type": "Linear", "scheme": scheme}]}).match(TinyLM())
    problems = check(plan, [EXPORTER])
    assert all(why in p.message and p.nearest is not None and p.nearest.is_static for p in problems)
    assert problems


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "absent"])
def test_a_file_that_is_no_model_is_one_line(tmp_path: Path, exported: Any, damage: str) -> None:
    whole = exported("int4-weight-only").artifact.path.read_bytes()
    data = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no model\n" * 200}
    path = tmp_path / "a.onnx"
    if damage in data:
        path.write_bytes(data[damage])
    with pytest.raises(QawareError, match=r"^a\.onnx: ONNX Runtime cannot load it: ") as caught:
        EXPORTER.open(path, SIGNATURE)
    assert str(caught.value).isprintable()


def test_errors_while_running_and_other_signatures_are_one_line(exported: Any) -> None:
    made = exported("int4-weight-only")
    with pytest.raises(QawareError, match="ONNX Runtime cannot run it: "):
        made.run(torch.zeros(1, 3))
    two = Signature((*SIGNATURE.inputs, TensorSpec("more", "float32", (1,))), SIGNATURE.symbols)
    with pytest.raises(QawareError, match="takes 1 inputs, its signature has 2"):
        EXPORTER.open(made.artifact.path, two)


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
    state = (logging.getLogger("torch.onnx").level, list(warnings.filters), torch.is_grad_enabled())
    made = make(quantized, tmp_path / "a.onnx", SIGNATURE, tokens(3))
    assert (logging.getLogger("torch.onnx").level, list(warnings.filters), torch.is_grad_enabled()) == state
    assert capfd.readouterr() == ("", "")
    assert torch.equal(quantized.module(tokens(9)), expected)
    assert all(torch.equal(w.data, before[name]) for name, w in quantized.weights.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.json"]
    written = made.artifact.path.read_bytes()
    assert not [word for word in (b".py", str(tmp_path).encode(), b"site-packages") if word in written]
