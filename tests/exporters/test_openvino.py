"""The OpenVINO exporter: integers in the folder, numbers of every scheme, int8 networks, generation."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

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
from qaware.exporters.check import check
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import Parity, compare
from qaware.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import generating_lm as lm
import static_net
from tiny import SIGNATURE, TinyLM, quantize, tokens

EXPORTER = get_exporter("openvino")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)
NOISE = 5e-7
"""Measured at most 2e-7; one int4 that is a step off is 3e-5."""
INT4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
SCHEMES = [
    *[{**INT4, "bits": bits} for bits in (3, 4, 5, 8)],
    {"bits": 4, "symmetric": False, "group_size": 6},
    {"bits": 4, "group_size": 3},
    {"bits": 2, "symmetric": False, "group_size": 3},
    {"bits": 8, "symmetric": False, "activation": "int8-dynamic"},
    {"bits": 2, "levels": "stretched"},
    {"bits": 16},
]
IDS = Signature((TensorSpec("ids", "int64", (1, "n"), 0, 89),), {"n": (1, 90)})


def convert(model: nn.Module, scheme: dict[str, Any]) -> QuantizedModel:
    table = {**scheme, "activation": "none"} if scheme["bits"] < 16 else scheme
    rules = [{"type": "Embedding", "scheme": table}, {"type": "Linear", "scheme": scheme}]
    work = copy.deepcopy(model).eval()
    plan = Recipe.load({"name": "all", "rules": rules}).match(work)
    engine = ModulesEngine()
    return engine.convert(engine.prepare(work, plan), plan)


def export(made: QuantizedModel, folder: Path, signature: Signature, example: Tensor) -> Artifact:
    return EXPORTER.export(made, (example,), signature, folder / "a.openvino")


def distance(made: QuantizedModel, artifact: Artifact, *inputs: Tensor) -> Parity:
    reference = artifact.signature.wrap(EXPORTER.reference(made)).eval()
    run = EXPORTER.open(artifact.path, artifact.signature)
    return compare(run, reference, [(x,) for x in inputs], made.outputs.values())


def constants(artifact: Artifact) -> dict[str, Any]:
    """Type and values of each constant, read by OpenVINO."""
    import openvino

    model = openvino.Core().read_model(artifact.path / "model.xml")
    nodes = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return {node.get_friendly_name(): values(node) for node in nodes}


def values(node: Any) -> tuple[str, np.ndarray]:
    """Two of 4 bits in a byte, the first in the lower ones, those of ``i4`` with a sign."""
    kind, shape = node.get_output_element_type(0).get_type_name(), list(node.get_output_shape(0))
    raw = np.array(node.get_data())
    if kind in ("i4", "u4"):
        pairs = np.stack([raw & 15, (raw.view(np.uint8) >> 4) & 15], -1).astype(np.int16)
        raw = pairs.reshape(-1)[: np.prod(shape, dtype=int)]
        raw = np.where(raw > 7, raw - 16, raw) if kind == "i4" else raw
    return kind, raw.reshape(shape)


def same_integers(weight: QuantizedWeight, stored: dict[str, Any], name: str) -> bool:
    kind, codes = stored[f"module.{name}.packed.codes"]
    block = weight.data.shape[1] // weight.scale.shape[1]
    bits = 4 if weight.scheme.stored_bits <= 4 and block % 2 == 0 else 8
    assert kind == f"{'i' if weight.zero_point is None else 'u'}{bits}"
    middle = 0 if weight.zero_point is None else 2 ** (bits - 1)
    same = np.array_equal(codes.astype(np.int16).reshape(weight.data.shape) - middle, weight.data.numpy())
    scale = stored[f"module.{name}.packed.scale"][1]
    same = same and np.array_equal(scale.reshape(weight.scale.shape), weight.scale.numpy())
    if weight.zero_point is None:
        return same
    kind, zeros = stored[f"module.{name}.packed.zeros"]
    zeros = zeros.astype(np.int16).reshape(weight.scale.shape) - middle
    return same and kind == f"u{bits}" and np.array_equal(zeros, weight.zero_point.numpy())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_integers_and_numbers_of_every_scheme(tmp_path: Path, scheme: dict[str, Any]) -> None:
    made = convert(nn.Sequential(nn.Embedding(90, 96), nn.Linear(96, 42)), scheme)
    artifact = export(made, tmp_path, IDS, torch.arange(3)[None])
    assert distance(made, artifact, torch.arange(90)[None], torch.arange(7, 8)[None]).relative < NOISE
    stored = constants(artifact)
    if scheme["bits"] < 16:
        assert all(same_integers(w, stored, name) for name, w in made.weights.items())
    else:
        assert {kind for kind, values in stored.values() if values.size > 1000} == {"f16"}


def test_rows_of_odd_width_take_8_bits(tmp_path: Path) -> None:
    made = convert(nn.Sequential(nn.Embedding(90, 31), nn.Linear(31, 42)), {"bits": 4})
    artifact = export(made, tmp_path, IDS, torch.arange(3)[None])
    assert distance(made, artifact, torch.arange(90)[None]).relative < NOISE
    assert artifact.notes[-1] == "weights take a width that OpenVINO has: int4 as 8 bits"


@pytest.mark.parametrize("recipe", ["int4-weight-only", "int8-dynamic", "int8-static"])
def test_language_models(tmp_path: Path, recipe: str) -> None:
    made = quantize(recipe, tie=recipe == "int4-weight-only")
    artifact = export(made, tmp_path, SIGNATURE, tokens(1))
    assert distance(made, artifact, *[tokens(n, n) for n in (1, 2, 17, 64)]).relative < NOISE
    assert artifact.notes[0].startswith("scored with INFERENCE_PRECISION_HINT f32")
    files = sorted(artifact.path.iterdir())
    assert [file.name for file in files] == ["cache.json", "model.bin", "model.xml"]
    assert artifact.bytes == sum(file.stat().st_size for file in files)
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in files)
    if recipe == "int4-weight-only":
        codes = {name for name in constants(artifact) if name.endswith(".codes")}
        assert not {"module.embed.packed.codes", "module.lm_head.packed.codes"} <= codes, "tied"
        assert len(codes) == 5


def test_a_wrong_integer_is_beyond_the_tolerance(tmp_path: Path) -> None:
    made = quantize("int4-weight-only")
    artifact = export(made, tmp_path, SIGNATURE, tokens(3))
    wrong = copy.deepcopy(made)
    layer = wrong.weights["qkv"].data
    layer[3, 40] += 1 if layer[3, 40] < 7 else -1
    wrong.module.qkv.weight = nn.Parameter(wrong.weights["qkv"].dequantize())
    wrong.weights.pop("qkv")
    assert not distance(wrong, artifact, tokens(8)).within(EXPORTER.tolerance)


@pytest.mark.parametrize("recipe", ["int8-static", "int8-static-per-tensor"])
def test_int8_networks(tmp_path: Path, recipe: str) -> None:
    torch.manual_seed(0)
    model, batches = static_net.StaticNet().eval(), [static_net.images(2, seed) for seed in range(4)]
    made = qaware.quantize(model, recipe, batches, runtimes=["openvino"])
    artifact = export(made, tmp_path, static_net.SIGNATURE, static_net.images(1))
    parity = distance(made, artifact, *[static_net.images(n, n) for n in static_net.BATCHES])
    assert parity.within(EXPORTER.tolerance_for(made.plan))
    stored = constants(artifact)
    for name, weight in made.weights.items():
        kind, values = stored[f"module.{name}.weight"]
        assert kind == "i8"
        assert np.array_equal(values.reshape(weight.data.shape), weight.data.numpy())
    made.module.fc.weight_scale *= 1.5
    assert not distance(made, artifact, static_net.images(32)).within(EXPORTER.tolerance_for(made.plan))


def test_generation(tmp_path: Path) -> None:
    made = lm.quantized("int4-weight-only", "openvino")
    lm.require_generation(EXPORTER, made, lm.export(EXPORTER, made, tmp_path))


def test_a_model_in_bfloat16_runs_in_float32(tmp_path: Path) -> None:
    made = convert(TinyLM().to(torch.bfloat16), INT4)
    assert distance(made, export(made, tmp_path, SIGNATURE, tokens(5)), tokens(33)).relative < NOISE


@pytest.mark.parametrize("change", [{"group_size": 32}, {"symmetric": False}], ids=str)
def test_refuses_what_int8_products_have_not(change: dict[str, Any]) -> None:
    scheme = {"bits": 8, "activation": "int8-static", **change}
    plan = Recipe.load({"name": "all", "rules": [{"type": "Linear", "scheme": scheme}]}).match(TinyLM())
    problems = check(plan, [EXPORTER])
    assert problems
    assert all("int8-static activations" in p.message and p.nearest is not None for p in problems)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(quantize("int8-weight-only"), tmp_path_factory.mktemp("int8"), SIGNATURE, tokens(3))


@pytest.mark.parametrize("data", [None, b"", b"no model\n" * 200], ids=["missing", "empty", "text"])
@pytest.mark.parametrize("name", ["model.xml", "cache.json", "model.bin"])
def test_a_damaged_folder_is_one_line(int8: Artifact, tmp_path: Path, name: str, data: bytes | None) -> None:
    path = tmp_path / "a.openvino"
    shutil.copytree(int8.path, path)
    (path / name).unlink()
    if data is not None:
        (path / name).write_bytes(data)
    with pytest.raises(QawareError, match=r"^a\.openvino: OpenVINO cannot load it: "):
        EXPORTER.open(path, SIGNATURE)


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_a_changed_file_in_the_folder_is_found(int8: Artifact, tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.openvino"
    shutil.copytree(int8.path, path)
    shutil.copy(int8.sidecar, tmp_path)
    Artifact.open(path)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(QawareError, match=r"a\.openvino: is damaged or was changed"):
        Artifact.open(path)


def test_errors_while_running_are_one_line(int8: Artifact) -> None:
    with pytest.raises(QawareError, match="OpenVINO cannot run it: "):
        EXPORTER.open(int8.path, SIGNATURE)(torch.zeros(3, 3, 3, 3))
    two = Signature((*SIGNATURE.inputs, TensorSpec("more", "float32", (1,))), SIGNATURE.symbols)
    with pytest.raises(QawareError, match="takes 1 inputs, its signature has 2"):
        EXPORTER.open(int8.path, two)
