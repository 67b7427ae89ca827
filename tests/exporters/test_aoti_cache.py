"""A language model with a key-value cache on AOTInductor: one file for prompts and for single tokens."""

from __future__ import annotations

import re
import zipfile
from typing import Any, NamedTuple

import pytest
import torch

from qaware import quantize
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.isolated import IsolatedRunner
from qaware.lm import CausalLM
from qaware.parity import compare
from qaware.tasks import language_signature

LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 150,
}
SIGNATURE = language_signature("input_ids", 50, 80)
EXPORTER = get_exporter("aoti")


class Exported(NamedTuple):
    module: Any
    artifact: Artifact
    run: Any


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    if why := EXPORTER.missing():
        pytest.skip(why)
    torch.manual_seed(0)
    quantized = quantize(CausalLM(LLAMA).eval(), "int4-weight-only")
    path = tmp_path_factory.mktemp("cache") / "llama.pt2"
    artifact = EXPORTER.export(quantized, (tokens(1),), SIGNATURE, path)
    return Exported(quantized, artifact, EXPORTER.open(path, SIGNATURE))


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(length))


def test_whole_texts_of_any_length(llama: Exported) -> None:
    inputs = [(tokens(length),) for length in (1, 2, 33, 64, 65, 80)]
    parity = compare(llama.run, llama.module.module, inputs)
    parity.require("llama.pt2", EXPORTER.tolerance_for(llama.module.plan))


def test_steps_compute_what_the_whole_text_computes(llama: Exported) -> None:
    text = tokens(150)
    with torch.no_grad():
        expected = llama.module.module(text)
    parts = [(0, 60), *((i, i + 1) for i in range(60, 70)), (70, 150)]
    logits = torch.cat([llama.run.step(text[:, a:b], a) for a, b in parts], 1)
    assert (logits - expected).abs().max() < 1e-3 * expected.std()


def test_a_longer_text_before_leaves_nothing(llama: Exported) -> None:
    alone = llama.run(tokens(5))
    llama.run(tokens(80))
    assert torch.equal(llama.run(tokens(5)), alone)


def test_greedy_text_is_the_torch_models(llama: Exported) -> None:
    text = tokens(7)
    with IsolatedRunner(llama.artifact) as run:
        assert run.length == 150
        made = run.generate(text, 20)
    with torch.no_grad():
        for _ in range(20):
            text = torch.cat([text, llama.module.module(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, text)


def test_the_file_is_compressed_and_holds_no_cache(llama: Exported) -> None:
    with zipfile.ZipFile(llama.artifact.path) as archive:
        kinds = {e.filename.rpartition(".")[2]: e.compress_type for e in archive.infolist()}
        assert kinds["cpp"] == kinds["so"] == zipfile.ZIP_DEFLATED
        stored = sum(e.file_size for e in archive.infolist())
    assert llama.artifact.bytes < 0.7 * stored  # code and its text, which are most of such a small file
    assert llama.artifact.details["cache"]["length"] == 150


def test_attention_is_the_kernels_and_rotations_are_computed_once(llama: Exported) -> None:
    if not EXPORTER.multiplies_integers:  # type: ignore[attr-defined]
        pytest.skip("the kernel is for CPUs with AVX512-VNNI")
    with zipfile.ZipFile(llama.artifact.path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".kernel.cpp")]
        code = archive.read(name).decode()
    functions = code.split('extern "C"')
    assert sum("qaware::attend({" in function for function in functions) == 1
    assert sum(bool(re.search(r"\bcos\(", function)) for function in functions) == 1


def test_torch_loads_the_file_too(llama: Exported) -> None:
    loader = torch._C._aoti.AOTIModelPackageLoader(str(llama.artifact.path), "model", False, 1, -1)
    cache = [torch.zeros(1, heads, 80, dim) for heads, dim in [(2, 16)] * 4]
    (logits,) = loader.run([tokens(5), torch.arange(5), *cache])
    assert torch.equal(logits, llama.run(tokens(5)))


def test_notes_say_what_is_multiplied(llama: Exported) -> None:
    if not EXPORTER.multiplies_integers:  # type: ignore[attr-defined]
        pytest.skip("the kernel is for CPUs with AVX512-VNNI")
    assert llama.artifact.notes[0] == (
        "packed integers are multiplied in 15 linear layers: 15 with activations rounded to 16 bits for "
        "each token"
    )
