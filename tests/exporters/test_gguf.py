"""The GGUF exporter: integers in the file, numbers on llama.cpp, the tokenizer, what has no place."""

from __future__ import annotations

import re
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
from qaware.lm import CausalLM
from qaware.lm.tokens import train_tokenizer
from qaware.parity import compare
from qaware.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import generating_lm as lm
from tiny import TinyLM

EXPORTER = get_exporter("gguf")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)
INT4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
SCHEMES: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "int4 dynamic": {**INT4, "activation": "int8-dynamic"},
    "int8": {**INT4, "bits": 8},
    "int8 channel": {"bits": 8, "scale_dtype": "float16"},
    "int5": {"bits": 5, "group_size": 32, "scale_dtype": "float16"},
    "ternary": {**INT4, "bits": 2, "levels": "ternary"},
    "stretched": {**INT4, "bits": 2, "levels": "stretched"},
}
NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def model(kind: str = "llama", **settings: Any) -> CausalLM:
    """With norms and biases that are no ones and zeros, which would hide lost ones."""
    torch.manual_seed(0)
    wide = {"head_dim": 16} if kind == "qwen3" else {}  # its own default is 128
    made = CausalLM({**lm.CONFIG, "model_type": kind, **wide, **settings}).eval()
    for weight in made.parameters():
        nn.init.normal_(weight, 0.0 if weight.dim() > 1 else 0.5, 0.1)
    return made


def quantized(scheme: dict[str, Any], made: CausalLM | None = None) -> QuantizedModel:
    table = {**scheme, "activation": "none"} if scheme["bits"] < 16 else None
    rules = [{"type": "Linear", "scheme": scheme}, {"type": "Embedding", "scheme": table}]
    return qaware.quantize(made or model(), {"name": "all", "rules": rules}, runtimes=["gguf"])


def export(made: QuantizedModel, folder: Path, **metadata: Any) -> Artifact:
    return EXPORTER.export(made, (lm.text(5),), lm.SIGNATURE, folder / "a.gguf", metadata)


def relative(made: QuantizedModel, artifact: Artifact) -> float:
    reference = lm.SIGNATURE.wrap(EXPORTER.reference(made)).eval()
    inputs = [(lm.text(n, n),) for n in (1, 3, 16)]
    return compare(EXPORTER.open(artifact.path, lm.SIGNATURE), reference, inputs).relative


def stored(artifact: Artifact) -> dict[str, Any]:
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(artifact.path).tensors}


def integers(tensor: Any) -> tuple[Tensor, Tensor]:
    """Integers (rows, width) and scales (rows, blocks) of llama.cpp's blocks of 32."""
    rows = tensor.shape[1]
    blocks = tensor.data.reshape(rows, -1, 18 if tensor.tensor_type.name == "Q4_0" else 34)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)[..., 0]
    body = np.ascontiguousarray(blocks[..., 2:])
    if tensor.tensor_type.name == "Q4_0":
        body = np.concatenate([body & 15, body >> 4], -1).astype(np.int8) - 8
    return torch.from_numpy(body.view(np.int8).reshape(rows, -1)), torch.from_numpy(scale)


def name_of(module: str) -> str:
    whole = {"embed_tokens": "token_embd", "lm_head": "output"}
    last = module.rpartition(".")[2]
    if last in whole:
        return f"{whole[last]}.weight"
    return f"blk.{re.search(r'layers.([0-9]+)', module)[1]}.{NAMES[last]}.weight"


def in_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of which the first half of a head met the second, as pairs of neighbours."""
    first, second = rows.view(heads, 2, -1, rows.shape[1]).unbind(1)
    return torch.stack([first, second], 2).reshape(rows.shape)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_the_file_holds_the_integers_and_scales_of_the_engine(tmp_path: Path, scheme: dict[str, Any]) -> None:
    made = quantized(scheme)
    assert check(made.plan, [EXPORTER]) == []
    artifact = export(made, tmp_path)
    tensors = stored(artifact)
    for name, weight in made.weights.items():
        tensor = tensors[name_of(name)]
        assert tensor.tensor_type.name == ("Q4_0" if weight.scheme.stored_bits <= 4 else "Q8_0")
        data, scale = weight.data, weight.scale
        assert scale is not None
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            data, scale = in_neighbours(data, heads), in_neighbours(scale, heads)
        found, found_scale = integers(tensor)
        assert torch.equal(found, data), name
        assert torch.equal(found_scale, scale.repeat_interleave(found_scale.shape[1] // scale.shape[1], 1)), (
            name
        )
    assert relative(made, artifact) < 0.025


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tie", [False, True])
def test_every_kind_of_model(tmp_path: Path, kind: str, tie: bool) -> None:
    made = quantized(INT4, model(kind, tie_word_embeddings=tie))
    artifact = export(made, tmp_path)
    assert relative(made, artifact) < 0.025
    assert ("output.weight" in stored(artifact)) is not tie


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_float_model_is_exact(tmp_path: Path, kind: str) -> None:
    module = model(kind, **({"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}))
    plan = Recipe.load({"name": "float", "rules": [{"name": "*", "scheme": None}]}).match(module)
    made = QuantizedModel(module, plan, {})
    artifact = export(made, tmp_path)
    assert relative(made, artifact) < 2e-6
    assert EXPORTER.tolerance_for(plan).relative == 1e-5


def test_float16_weights_and_a_model_in_bfloat16(tmp_path: Path) -> None:
    made = quantized({"bits": 16})
    artifact = export(made, tmp_path)
    assert stored(artifact)["output.weight"].tensor_type.name == "F16"
    assert relative(made, artifact) < 2e-3
    half = quantized(INT4, model().to(torch.bfloat16))
    assert relative(half, export(half, tmp_path)) < 0.025


def test_lost_rows_and_scales_are_beyond_the_tolerance(tmp_path: Path) -> None:
    made = quantized(INT4)
    run = EXPORTER.open(export(made, tmp_path).path, lm.SIGNATURE)
    for wrong in ("q_proj", "down_proj"):
        other = quantized(INT4)
        name = f"model.model.layers.0.{'self_attn' if wrong == 'q_proj' else 'mlp'}.{wrong}"
        value = made.weights[name].dequantize()
        value = in_neighbours(value, 4) if wrong == "q_proj" else value * 2
        other.module.get_submodule(name).weight = nn.Parameter(value)
        parity = compare(run, lm.SIGNATURE.wrap(other.module).eval(), [(lm.text(16),)])
        assert not parity.within(EXPORTER.tolerance), wrong


def test_generation(tmp_path: Path) -> None:
    made = quantized(INT4)
    lm.require_generation(EXPORTER, made, export(made, tmp_path))
    runner: Any = EXPORTER.open(tmp_path / "a.gguf", lm.SIGNATURE)
    runner(lm.text(3))
    with pytest.raises(QawareError, match="step at 9, but only 3 tokens were given"):
        runner.step(lm.text(1), 9)


def test_the_tokenizer_goes_into_the_file(tmp_path: Path) -> None:
    import llama_cpp

    texts = ["def f(x):\n    return x + 12345\n", "naïve café — “quotes” 日本\t\t!", "it's  two   spaces"]
    tokenizer = train_tokenizer(texts * 3, 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = quantized(INT4, model(vocab_size=310))
    artifact = export(made, tmp_path, tokenizer="tokenizer")
    assert not [note for note in artifact.notes if "tokenizer" in note]
    llama = llama_cpp.Llama(str(artifact.path), vocab_only=True, verbose=False)
    for text in texts:
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer(text)["input_ids"]
    assert (llama.token_bos(), llama.token_eos()) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert llama.n_vocab() == 310
    assert relative(made, artifact) < 0.025


def test_without_a_tokenizer_the_report_says_so(tmp_path: Path) -> None:
    assert export(quantized(INT4), tmp_path).notes[0].startswith("no tokenizer is in the file")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram"}, "pre_tokenizer": null}')
    notes = export(quantized(INT4), tmp_path, tokenizer="tokenizer").notes
    assert "tokenizer.json is no byte-level BPE" in notes[0]


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ({"bits": 4, "group_size": 32}, "blocks float16; use scale_dtype: bfloat16 or float16"),
        ({**INT4, "symmetric": False}, "zero points"),
        ({**INT4, "group_size": 16}, "multiples of 32"),
        ({**INT4, "activation": "int8-static"}, "no static activations"),
    ],
    ids=str,
)
def test_refuses_what_its_blocks_cannot_hold(scheme: dict[str, Any], why: str) -> None:
    plan = Recipe.load({"name": "all", "rules": [{"type": "Linear", "scheme": scheme}]}).match(model())
    problems = check(plan, [EXPORTER])
    assert problems
    assert all(why in p.message and p.nearest is not None for p in problems)


def test_refuses_other_models(tmp_path: Path) -> None:
    plan = Recipe.load({"name": "all", "rules": [{"type": "Linear", "scheme": INT4}]}).match(TinyLM())
    problems = check(plan, [EXPORTER])
    assert "a .gguf has no place for it" in problems[0].message
    other = CausalLM({"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 96}).eval()
    rule = {"name": "float", "rules": [{"name": "*", "scheme": None}]}
    for module, why in (
        (other, "model_type 'gpt2' is none of llama, mistral, qwen2, qwen3"),
        (model(hidden_act="gelu"), "hidden_act is 'gelu', only 'silu' is written"),
        (model("qwen3", attention_bias=True), "q_proj.bias: llama.cpp has no place for it"),
    ):
        with pytest.raises(QawareError, match=re.escape(why)):
            export(QuantizedModel(module, Recipe.load(rule).match(module), {}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scales_outside_float16_name_the_layer(tmp_path: Path) -> None:
    small = model()
    with torch.no_grad():
        small.model.lm_head.weight[5] *= 1e-5
    with pytest.raises(QawareError, match=r"^model\.lm_head: scale .* is not exact in the float16"):
        export(quantized(INT4, small), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [None, b"", b"GGUF", b"no model\n" * 200])
def test_a_file_that_is_no_model_is_one_line(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "a.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(QawareError, match=r"^a\.gguf: llama\.cpp cannot load it"):
        EXPORTER.open(path, lm.SIGNATURE)
