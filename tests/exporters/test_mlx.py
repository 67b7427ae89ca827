"""The MLX exporter: integers in the folder, numbers on MLX, the tokenizer, what has no place."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qaware
from qaware.engines.base import QuantizedModel, QuantizedWeight
from qaware.errors import QawareError
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.check import check
from qaware.exporters.mlx_weights import pack
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
from tiny import TinyLM

EXPORTER = get_exporter("mlx")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)
NOISE = 1e-6
"""Measured at most 4e-7 with one scale a group; one int4 that is a step off is 1e-3."""
INT4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
SCHEMES: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "int4 dynamic": {**INT4, "activation": "int8-dynamic"},
    "int4 float32": {"bits": 4, "group_size": 64},
    "int4 asymmetric": {**INT4, "symmetric": False},
    "int8 channel": {"bits": 8, "scale_dtype": "float16"},
    "int8 asymmetric": {"bits": 8, "symmetric": False, "activation": "int8-dynamic"},
    **{f"int{bits}": {**INT4, "bits": bits} for bits in (1, 2, 3, 5, 6, 7)},
    "ternary": {**INT4, "bits": 2, "levels": "ternary"},
    "stretched": {**INT4, "bits": 2, "levels": "stretched"},
}
TEXT = "the cat sat on the mat and the dog sat on the cat; "


def model(kind: str = "llama", **settings: Any) -> CausalLM:
    """With norms and biases that are no ones and zeros, which would hide lost ones."""
    torch.manual_seed(0)
    own: dict[str, Any] = {"qwen3": {"head_dim": 16}, "phi3": {"pad_token_id": 0}}.get(kind, {})
    if kind.startswith("gemma"):
        own = {"head_dim": 16, "num_hidden_layers": 6, "pad_token_id": 0}
    made = CausalLM({**lm.CONFIG, "intermediate_size": 128, "model_type": kind, **own, **settings}).eval()
    for weight in made.parameters():
        nn.init.normal_(weight, 0.0 if weight.dim() > 1 else 0.5, 0.1)
    return made


def quantized(
    scheme: dict[str, Any], made: nn.Module | None = None, *first: dict[str, Any]
) -> QuantizedModel:
    table = {**scheme, "activation": "none"} if scheme["bits"] < 16 else scheme
    rules = [*first, {"type": "Linear", "scheme": scheme}, {"type": "Embedding", "scheme": table}]
    return qaware.quantize(made or model(), {"name": "all", "rules": rules}, runtimes=["mlx"])


def export(made: QuantizedModel, folder: Path, **metadata: Any) -> Artifact:
    return EXPORTER.export(made, (lm.text(5),), lm.SIGNATURE, folder / "a.mlx", metadata)


def parity(made: QuantizedModel, artifact: Artifact) -> Parity:
    reference = lm.SIGNATURE.wrap(EXPORTER.reference(made)).eval()
    inputs = [(lm.text(n, n),) for n in (1, 3, 16)]
    return compare(EXPORTER.open(artifact.path, lm.SIGNATURE), reference, inputs)


def config(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / "config.json").read_text())


def require_same(weight: QuantizedWeight, name: str, artifact: Artifact) -> None:
    """Integers, scales and zero points, read bit by bit."""
    saved, form = load_file(artifact.path / "model.safetensors"), config(artifact)["quantization"][name]
    words = saved[f"{name}.weight"].numpy()
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(words), -1, form["bits"]) @ (1 << np.arange(form["bits"]))
    low = -(2 ** (form["bits"] - 1))
    assert torch.equal(torch.from_numpy(codes + low).to(torch.int8), weight.data), name
    scales, biases = saved[f"{name}.scales"].float(), saved[f"{name}.biases"].float()
    assert weight.data.shape[1] == scales.shape[1] * form["group_size"]
    assert weight.scale is not None
    repeats = scales.shape[1] // weight.scale.shape[1]
    assert torch.equal(scales, weight.scale.repeat_interleave(repeats, 1)), name
    zeros = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    found = (low - biases / scales).round()
    assert torch.equal(found, zeros.float().repeat_interleave(repeats, 1)), name


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_the_folder_holds_the_integers_and_scales_of_the_engine(
    tmp_path: Path, scheme: dict[str, Any]
) -> None:
    made = quantized(scheme)
    assert check(made.plan, [EXPORTER]) == []
    artifact = export(made, tmp_path)
    assert len(made.weights) == 16
    for name, weight in made.weights.items():
        require_same(weight, name.removeprefix("model."), artifact)
    assert parity(made, artifact).relative < NOISE


def test_scales_take_the_bytes_of_their_precision(tmp_path: Path) -> None:
    for scheme, dtype in (
        ("int4", torch.bfloat16),
        ("int4 float32", torch.float32),
        ("int7", torch.bfloat16),
    ):
        saved = load_file(export(quantized(SCHEMES[scheme]), tmp_path).path / "model.safetensors")
        assert saved["lm_head.scales"].dtype == saved["lm_head.biases"].dtype == dtype, scheme
        assert saved["model.embed_tokens.scales"].dtype == torch.float32
    # 2 ** 3 less a zero point has more bits than bfloat16 keeps.
    saved = load_file(export(quantized(SCHEMES["int4 asymmetric"]), tmp_path).path / "model.safetensors")
    assert saved["lm_head.biases"].dtype == torch.float32


def test_repeated_scales_are_told(tmp_path: Path) -> None:
    wide = quantized({"bits": 8}, model(hidden_size=128))
    artifact = export(wide, tmp_path)
    forms = config(artifact)["quantization"]
    assert (forms["bits"], forms["group_size"], forms["mode"]) == (8, 128, "affine")
    assert not [note for note in artifact.notes if "repeated" in note]
    narrow = export(quantized({"bits": 8}, model(intermediate_size=192)), tmp_path)
    # Rows of 192 in groups of 64: two more scales and biases in each of 64 rows and two layers.
    assert narrow.notes[0] == "scales and biases are repeated for MLX's smaller groups: 2,048 bytes"


def test_layers_may_differ(tmp_path: Path) -> None:
    first = [
        {"name": "*q_proj", "scheme": {"bits": 8, "group_size": 64}},
        {"name": "*down_proj", "scheme": {"bits": 16}},
        {"name": "*up_proj", "scheme": None},
    ]
    made = quantized(INT4, None, *first)
    artifact = export(made, tmp_path)
    forms, saved = config(artifact)["quantization"], load_file(artifact.path / "model.safetensors")
    assert forms["model.layers.0.self_attn.q_proj"] == {"group_size": 64, "bits": 8}
    assert (forms["bits"], forms["group_size"]) == (4, 32)
    assert saved["model.layers.1.mlp.down_proj.weight"].dtype == torch.float16
    assert saved["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32
    assert parity(made, artifact).relative < NOISE


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("tie", [False, True])
def test_every_kind_of_model(tmp_path: Path, kind: str, tie: bool) -> None:
    made = quantized(INT4, model(kind, tie_word_embeddings=tie))
    artifact = export(made, tmp_path)
    assert parity(made, artifact).relative < NOISE
    assert config(artifact)["tie_word_embeddings"] is tie
    assert ("lm_head.scales" in load_file(artifact.path / "model.safetensors")) is not tie


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_models_that_scale_their_embeddings(tmp_path: Path, kind: str) -> None:
    rules = {"full_attention": {"rope_theta": 700.0}, "sliding_attention": {"rope_theta": 90.0}}
    own = {"rope_parameters": rules} if kind == "gemma3_text" else {}
    made = quantized(INT4, model(kind, tie_word_embeddings=True, **own), {"name": "*lm_head", "scheme": None})
    assert parity(made, export(made, tmp_path)).relative < 2e-6


def test_a_rotation_that_is_stretched_and_biases(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    module = model(rope_parameters=rope, attention_bias=True, mlp_bias=True)
    plan = Recipe.load({"name": "float", "rules": [{"name": "*", "scheme": None}]}).match(module)
    made = QuantizedModel(module, plan, {})
    artifact = export(made, tmp_path)
    assert parity(made, artifact).relative < NOISE
    assert "quantization" not in config(artifact)


@pytest.mark.parametrize("head", [{"bits": 8}, None], ids=str)
def test_an_embedding_that_no_longer_is_the_head(tmp_path: Path, head: dict[str, Any] | None) -> None:
    made = quantized(INT4, model(tie_word_embeddings=True), {"name": "*lm_head", "scheme": head})
    artifact = export(made, tmp_path)
    assert parity(made, artifact).relative < NOISE
    assert config(artifact)["tie_word_embeddings"] is False
    assert ("model.lm_head" in made.weights) is (head is not None)
    for name in {"model.model.embed_tokens", "model.lm_head"} & set(made.weights):
        require_same(made.weights[name], name.removeprefix("model."), artifact)


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_in_bfloat16_runs_in_float32(tmp_path: Path, tie: bool) -> None:
    ends = [{"name": name, "scheme": None} for name in ("*lm_head", "*embed_tokens")] if tie else []
    made = quantized(INT4, model(tie_word_embeddings=tie).to(torch.bfloat16), *ends)
    artifact = export(made, tmp_path)
    saved = load_file(artifact.path / "model.safetensors")
    assert parity(made, artifact).relative < NOISE
    assert saved["model.norm.weight"].dtype == torch.float32
    assert config(artifact)["tie_word_embeddings"] is tie


@pytest.mark.parametrize("tie", [False, True])
def test_float16_weights(tmp_path: Path, tie: bool) -> None:
    made = quantized({"bits": 16}, model(tie_word_embeddings=tie))
    artifact = export(made, tmp_path)
    saved = load_file(artifact.path / "model.safetensors")
    assert saved["model.embed_tokens.weight"].dtype == torch.float16
    assert ("lm_head.weight" in saved) is not tie
    assert all(
        torch.equal(saved[n.removeprefix("model.") + ".weight"], w.data)
        for n, w in made.weights.items()
        if "layers" in n
    )
    assert parity(made, artifact).relative < NOISE


def test_float16_embeddings_that_are_multiplied_are_within_their_tolerance(tmp_path: Path) -> None:
    made = quantized({"bits": 16}, model("granite", embedding_multiplier=11.3))
    found = parity(made, export(made, tmp_path))
    assert found.within(EXPORTER.tolerance_for(made.plan))
    assert not found.within(EXPORTER.tolerance)
    only = Recipe.load({"name": "l", "rules": [{"type": "Linear", "scheme": {"bits": 16}}]}).match(model())
    assert EXPORTER.tolerance_for(only) == EXPORTER.tolerance


def test_a_wrong_integer_is_beyond_the_tolerance(tmp_path: Path) -> None:
    made, other = quantized(INT4), quantized(INT4)
    artifact = export(made, tmp_path)
    name = "model.model.layers.0.mlp.down_proj"
    weight = other.weights[name]
    weight.data[3, 40] += 1 if weight.data[3, 40] < 7 else -1
    other.module.get_submodule(name).weight = nn.Parameter(weight.dequantize())
    other.weights.pop(name)
    assert not parity(other, artifact).within(EXPORTER.tolerance)


def test_whole_texts_in_batches_need_no_cache(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("input_ids", "int64", (3, "seq"), 0, 95),), {"seq": (1, 16)})
    ids = torch.cat([lm.text(7, seed) for seed in range(3)])
    made = quantized(INT4)
    artifact = EXPORTER.export(made, (ids,), signature, tmp_path / "a.mlx")
    reference = signature.wrap(EXPORTER.reference(made)).eval()
    assert compare(EXPORTER.open(artifact.path, signature), reference, [(ids,)]).relative < NOISE
    assert any(note.startswith("no key-value cache: its inputs are") for note in artifact.notes)


def test_a_model_of_transformers_itself(tmp_path: Path) -> None:
    made = quantized(INT4, model().model)
    signature = language_signature("input_ids", lm.VOCABULARY, lm.LONGEST, "input_ids")
    artifact = EXPORTER.export(made, (lm.text(5),), signature, tmp_path / "a.mlx")
    reference = signature.wrap(EXPORTER.reference(made)).eval()
    assert compare(EXPORTER.open(artifact.path, signature), reference, [(lm.text(7),)]).relative < NOISE
    require_same(made.weights["lm_head"], "lm_head", artifact)


def test_more_rows_than_are_packed_at_once() -> None:
    data = torch.arange(2500 * 32).remainder(16).sub(8).to(torch.int8).view(2500, 32)
    packed = pack(data, 4)
    assert (packed.dtype, packed.shape) == (torch.uint32, (2500, 4))
    assert packed[2049].tolist() == [0x76543210, 0xFEDCBA98] * 2


def test_generation(tmp_path: Path) -> None:
    made = quantized(INT4)
    lm.require_generation(EXPORTER, made, export(made, tmp_path))
    runner: Any = EXPORTER.open(tmp_path / "a.mlx", lm.SIGNATURE)
    runner(lm.text(3))
    with pytest.raises(QawareError, match="step at 9, but only 3 tokens were given"):
        runner.step(lm.text(1), 9)
    ids = lm.text(9)
    expected = runner(ids)
    runner.step(lm.text(4, 5), 5)
    assert torch.allclose(runner.step(ids[:, 5:], 5), expected[:, 5:], atol=1e-4)


def test_mlx_lm_reads_text_and_goes_on_as_torch_does(tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    tokenizer = train_tokenizer([TEXT * 3], 280)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = quantized(INT4, model(vocab_size=len(tokenizer)))
    signature = language_signature("input_ids", len(tokenizer), lm.LONGEST)
    about = {"tokenizer": "tokenizer", "data": {"bos": False}}
    artifact = EXPORTER.export(made, (lm.text(5),), signature, tmp_path / "a.mlx", about)
    assert not [note for note in artifact.notes if "tokenizer" in note]
    loaded, wrapped = mlx_lm.load(str(artifact.path))
    ids = wrapped.encode("the cat sat", add_special_tokens=False)
    assert ids == tokenizer.encode("the cat sat", add_special_tokens=False)
    found = [int(token) for token, _ in generate_step(mx.array(ids), loaded, max_tokens=20)]
    expected, reference = list(ids), EXPORTER.reference(made)
    with torch.no_grad():
        for _ in range(20):
            expected.append(lm.greedy(reference, torch.tensor([expected])))
    assert found == expected[len(ids) :]
    assert len(set(found)) > 2, "one token again and again would hide a lost position"
    ours = generate(artifact.path, "the cat sat", 20).tokens
    assert ours == found[: len(ours)]


def test_nothing_of_this_machine_is_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model().model.save_pretrained(folder)
    made = quantized(INT4, CausalLM(str(folder)).eval())
    artifact = export(made, tmp_path)
    assert artifact.notes[0].startswith("no tokenizer is in the folder")
    files = sorted(artifact.path.iterdir())
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in files)
    assert parity(made, artifact).relative < NOISE


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ({**INT4, "group_size": 16}, "does not fill MLX's groups of 32, 64, 128"),
        ({**INT4, "activation": "int8-static", "group_size": 0}, "has no static activations"),
    ],
    ids=str,
)
def test_refuses_what_mlx_cannot_hold(scheme: dict[str, Any], why: str) -> None:
    plan = Recipe.load({"name": "all", "rules": [{"type": "Linear", "scheme": scheme}]}).match(model())
    problems = check(plan, [EXPORTER])
    assert problems
    assert all(why in p.message and p.nearest is not None for p in problems)


def test_refuses_other_models_and_layers(tmp_path: Path) -> None:
    rule = {"name": "float", "rules": [{"name": "*", "scheme": None}]}
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1, "word_embed_proj_dim": 64, "hidden_size": 64}
    other = CausalLM({"model_type": "opt", "vocab_size": 96, **sizes}).eval()
    for module, why in ((other, "model_type 'opt' is no"), (TinyLM().eval(), "TinyLM is no language model")):
        with pytest.raises(QawareError, match=re.escape(f"mlx: {why}")):
            export(QuantizedModel(module, Recipe.load(rule).match(module), {}), tmp_path)
    assert list(tmp_path.iterdir()) == []
    scheme = {"type": "Conv2d", "scheme": {"bits": 8}}
    plan = Recipe.load({"name": "c", "rules": [scheme]}).match(nn.Sequential(nn.Conv2d(32, 32, 3)))
    assert "have no Conv2d; leave it float" in check(plan, [EXPORTER])[-1].message


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": 8}),
        ("phi3", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_refuses_a_window_that_mlx_lm_leaves_out(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    made = quantized(INT4, model(kind, **settings))
    with pytest.raises(QawareError, match=rf"^mlx: sliding_window: layers of '{kind}' see 8 of 16 tokens"):
        export(made, tmp_path)
    assert list(tmp_path.iterdir()) == []
    wide = quantized(INT4, model(kind, **{**settings, "sliding_window": 16}))
    assert parity(wide, export(wide, tmp_path)).relative < NOISE


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(quantized(INT4), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("data", [None, b"", b"no model\n" * 200], ids=["missing", "empty", "text"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_one_line(whole: Artifact, tmp_path: Path, name: str, data: bytes | None) -> None:
    path = tmp_path / "a.mlx"
    shutil.copytree(whole.path, path)
    (path / name).unlink()
    if data is not None:
        (path / name).write_bytes(data)
    with pytest.raises(QawareError, match=r"^a\.mlx: mlx_lm cannot load it: [^\n]*$"):
        EXPORTER.open(path, lm.SIGNATURE)


def test_a_changed_integer_is_found_when_it_is_opened(whole: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "a.mlx"
    shutil.copytree(whole.path, path)
    shutil.copy(whole.sidecar, tmp_path)
    Artifact.open(path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(QawareError, match=r"a\.mlx: is damaged or was changed"):
        Artifact.open(path)
