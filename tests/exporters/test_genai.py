"""The exporter for ONNX Runtime GenAI: integers in the folder, numbers of its Generator, text in and out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qaware
from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.check import check
from qaware.exporters.signature import Signature, TensorSpec
from qaware.generating import generate
from qaware.lm import CausalLM
from qaware.lm.tokens import train_tokenizer
from qaware.parity import Parity, compare
from qaware.recipe import Recipe
from qaware.tasks import language_signature

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import generating_lm as lm
from tiny import TinyLM, tokens

EXPORTER = get_exporter("onnxruntime-genai")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)
NOISE = 2e-6
INT4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
SCHEMES = [INT4, {"bits": 8}, {**INT4, "symmetric": False}]
TEXT = "the cat sat on the mat and the dog sat on the cat; "


def model(**settings: Any) -> CausalLM:
    torch.manual_seed(0)
    made = CausalLM({**lm.CONFIG, **settings}).eval()
    for weight in made.parameters():
        nn.init.normal_(weight, 0.0 if weight.dim() > 1 else 0.5, 0.1)
    return made


def quantized(scheme: dict[str, Any], made: nn.Module | None = None) -> QuantizedModel:
    table = {**scheme, "activation": "none"}
    rules = [{"type": "Linear", "scheme": scheme}, {"type": "Embedding", "scheme": table}]
    recipe = {"name": "all", "rules": rules}
    return qaware.quantize(made or model(), recipe, runtimes=["onnxruntime-genai"])


def export(made: QuantizedModel, folder: Path, **metadata: Any) -> Artifact:
    return EXPORTER.export(made, (lm.text(5),), lm.SIGNATURE, folder / "a.genai", metadata)


def parity(made: QuantizedModel, artifact: Artifact) -> Parity:
    reference = lm.SIGNATURE.wrap(EXPORTER.reference(made)).eval()
    inputs = [(lm.text(n, n),) for n in (16, 1, 3)]
    return compare(EXPORTER.open(artifact.path, lm.SIGNATURE), reference, inputs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedModel, Artifact]:
    made = quantized(INT4)
    return made, export(made, tmp_path_factory.mktemp("whole"))


def unpacked(stored: np.ndarray, bits: int, width: int) -> Tensor:
    """Integers (rows, width), the first in the lowest bits of a byte, counted from the smallest one."""
    parts = [(stored >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    codes = np.stack(parts, -1).reshape(len(stored), -1).astype(np.int16)
    return torch.from_numpy(codes - 2 ** (bits - 1))[:, :width].to(torch.int8)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_folder_holds_the_integers_and_scales_of_the_engine(
    tmp_path: Path, scheme: dict[str, Any]
) -> None:
    import onnx

    made = quantized(scheme)
    artifact = export(made, tmp_path)
    graph = onnx.load(str(artifact.path / "model.onnx")).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, weight in made.weights.items():
        held = {key: stored.get(f"module.{name}.packed.{key}") for key in ("codes", "scale", "zero_point")}
        rows, width = weight.data.shape
        integers = unpacked(held["codes"].reshape(rows, -1), scheme["bits"], width)
        assert torch.equal(integers, weight.data), name
        scale = torch.from_numpy(held["scale"].view(np.uint8).copy())
        dtype = getattr(torch, weight.scheme.scale_dtype)
        assert torch.equal(scale.view(dtype).float().view(weight.scale.shape), weight.scale), name
        assert (held["zero_point"] is None) is (weight.zero_point is None)
        if weight.zero_point is not None:
            zeros = unpacked(held["zero_point"], scheme["bits"], weight.scale.shape[1])
            assert torch.equal(zeros, weight.zero_point), name
    assert parity(made, artifact).relative < NOISE


def test_dynamic_activations_are_within_the_tolerance(tmp_path: Path) -> None:
    made = quantized({**INT4, "activation": "int8-dynamic"})
    artifact = export(made, tmp_path)
    assert parity(made, artifact).within(EXPORTER.tolerance_for(made.plan))
    assert any(note.startswith("accuracy_level 4") for note in artifact.notes)
    exact: Any = get_exporter({"onnxruntime-genai": {"accuracy_level": 0}})
    assert not [note for note in exact.notes(made.plan) if note.startswith("accuracy_level")]


def test_a_wrong_integer_is_beyond_the_tolerance(whole: tuple[QuantizedModel, Artifact]) -> None:
    other = quantized(INT4)
    name = "model.model.layers.0.mlp.down_proj"
    weight = other.weights[name]
    weight.data[3, 40] += 1 if weight.data[3, 40] < 7 else -1
    other.module.get_submodule(name).weight = nn.Parameter(weight.dequantize())
    other.weights.pop(name)
    assert not parity(other, whole[1]).within(EXPORTER.tolerance_for(whole[0].plan))


@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_tied_weights_biases_and_half_precision(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = quantized(INT4, model(**settings).to(torch.bfloat16))
    artifact = export(made, tmp_path)
    assert parity(made, artifact).relative < NOISE
    assert artifact.bytes == sum(file.stat().st_size for file in artifact.path.iterdir())


def test_generation(whole: tuple[QuantizedModel, Artifact]) -> None:
    made, artifact = whole
    lm.require_generation(EXPORTER, made, artifact)
    runner: Any = EXPORTER.open(artifact.path, lm.SIGNATURE)
    runner(lm.text(3))
    with pytest.raises(QawareError, match="step at 9, but only 3 tokens were given"):
        runner.step(lm.text(1), 9)


def test_genai_reads_text_and_goes_on_as_torch_does(tmp_path: Path) -> None:
    import onnxruntime_genai as genai

    tokenizer = train_tokenizer([TEXT * 3], 280)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = quantized(INT4, model(vocab_size=len(tokenizer) + 3))
    signature = language_signature("input_ids", len(tokenizer) + 3, lm.LONGEST)
    about = {"tokenizer": "tokenizer", "data": {"bos": False}}
    artifact = EXPORTER.export(made, (lm.text(5),), signature, tmp_path / "a.genai", about)
    assert not [note for note in artifact.notes if "tokenizer" in note]
    loaded = genai.Model(str(artifact.path))
    ids = genai.Tokenizer(loaded).encode("the cat sat").tolist()
    assert ids == tokenizer.encode("the cat sat", add_special_tokens=False)
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(ids) + 20)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    expected, reference = list(ids), EXPORTER.reference(made)
    with torch.no_grad():
        while len(expected) < len(found):
            expected.append(lm.greedy(reference, torch.tensor([expected])))
    assert found == expected
    assert len(found) == len(ids) + 20 or found[-1] == tokenizer.eos_token_id
    assert len(set(found[len(ids) :])) > 2, "one token again and again would hide a lost position"
    assert generate(artifact.path, "the cat sat", 20).tokens == found[len(ids) :]


def test_the_settings_name_the_ends_of_a_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], 280)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    artifact = export(quantized({"bits": 8}, model(vocab_size=300)), tmp_path, tokenizer="tokenizer")
    settings = json.loads((artifact.path / "genai_config.json").read_text())
    found = settings["model"]
    assert (found["bos_token_id"], found["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert found["pad_token_id"] == tokenizer.eos_token_id
    assert (found["vocab_size"], found["context_length"]) == (300, lm.CONTEXT)


def test_another_cache_and_another_name_of_the_input(tmp_path: Path) -> None:
    short: Any = get_exporter({"onnxruntime-genai": {"cache_length": 20}})
    signature = language_signature("tokens", lm.VOCABULARY, lm.LONGEST)
    made = quantized({"bits": 8})
    artifact = short.export(made, (lm.text(5),), signature, tmp_path / "b.genai")
    runner: Any = EXPORTER.open(artifact.path, signature)
    assert (runner.length, runner.most) == (20, lm.LONGEST)
    reference = signature.wrap(EXPORTER.reference(made)).eval()
    assert compare(runner, reference, [(lm.text(16),)]).relative < NOISE


def test_without_a_tokenizer_the_report_says_so(whole: tuple[QuantizedModel, Artifact]) -> None:
    assert "no tokenizer is in the folder: give GenAI token ids" in whole[1].notes
    files = sorted(whole[1].path.iterdir())
    assert [file.name for file in files] == ["genai_config.json", "model.onnx"]
    assert not any(str(whole[1].path.parent).encode() in file.read_bytes() for file in files)


def test_refuses_what_has_no_cache(tmp_path: Path) -> None:
    made = qaware.quantize(TinyLM().eval(), "int8-weight-only", runtimes=["onnxruntime-genai"])
    with pytest.raises(QawareError, match=r"onnxruntime-genai: the module has no step.*; use onnxruntime,"):
        EXPORTER.export(made, (tokens(5),), lm.SIGNATURE, tmp_path / "a.genai")
    rows = Signature((TensorSpec("input_ids", "int64", (3, "seq"), 0, 95),), {"seq": (1, 16)})
    with pytest.raises(QawareError, match="not one row of token ids; use onnxruntime,"):
        EXPORTER.export(quantized({"bits": 8}), (lm.text(5).expand(3, -1),), rows, tmp_path / "a.genai")
    assert list(tmp_path.iterdir()) == []


def test_refuses_layers_whose_caches_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "cache_shapes", lambda self, length: [(2, 16), (2, 16), (4, 16), (4, 16)])
    with pytest.raises(QawareError, match="GenAI has one size for all; use onnxruntime"):
        export(quantized({"bits": 8}), tmp_path)


def test_refuses_what_onnx_runtime_refuses() -> None:
    scheme = {"bits": 8, "activation": "int8-static", "group_size": 32}
    plan = Recipe.load({"name": "all", "rules": [{"type": "Linear", "scheme": scheme}]}).match(model())
    problems = check(plan, [EXPORTER])
    assert problems
    assert all(p.message.startswith("onnxruntime-genai: ") and p.nearest is not None for p in problems)


@pytest.mark.parametrize("data", [None, b"", b"no model\n" * 200], ids=["missing", "empty", "text"])
@pytest.mark.parametrize("name", ["genai_config.json", "model.onnx"])
def test_a_damaged_folder_is_one_line(
    whole: tuple[QuantizedModel, Artifact], tmp_path: Path, name: str, data: bytes | None
) -> None:
    path = tmp_path / "a.genai"
    shutil.copytree(whole[1].path, path)
    (path / name).unlink()
    if data is not None:
        (path / name).write_bytes(data)
    with pytest.raises(QawareError, match=r"^a\.genai: GenAI cannot load it: [^\n]*$"):
        EXPORTER.open(path, lm.SIGNATURE)


@pytest.mark.parametrize("name", ["genai_config.json", "model.onnx"])
def test_a_changed_file_is_found_when_it_is_opened(
    whole: tuple[QuantizedModel, Artifact], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "a.genai"
    shutil.copytree(whole[1].path, path)
    shutil.copy(whole[1].sidecar, tmp_path)
    Artifact.open(path)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(QawareError, match=r"a\.genai: is damaged or was changed"):
        Artifact.open(path)
