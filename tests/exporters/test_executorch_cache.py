"""Language models with a key-value cache on ExecuTorch."""

from __future__ import annotations

from pathlib import Path

import generating_lm as lm
import pytest
import torch

import qaware
from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.executorch import ExecuTorchExporter
from qaware.exporters.executorch_cache import KernelStep, PortableStep
from qaware.exporters.generation import CacheSpec
from qaware.exporters.isolated import open_artifact
from qaware.lm import CausalLM

pytest.importorskip("executorch")

INT8 = {"bits": 8, "activation": "int8-dynamic"}


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return lm.quantized("int8-dynamic-int4-weight", "executorch")


@pytest.fixture(scope="module")
def artifact(model: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return lm.export(ExecuTorchExporter(), model, tmp_path_factory.mktemp("kernel"))


def test_it_generates_with_the_llm_kernels(model: QuantizedModel, artifact: Artifact) -> None:
    lm.require_generation(ExecuTorchExporter(), model, artifact)
    assert artifact.details["cache"]["length"] == lm.CONTEXT
    assert any("llama::custom_sdpa" in note for note in artifact.notes)


def test_only_what_xnnpack_lacks_is_left_out(artifact: Artifact) -> None:
    portable = set(artifact.details["delegation"]["portable"])
    assert {"custom_sdpa", "embedding"} <= portable
    assert not portable & {"mean", "slice_copy", "cat", "unsqueeze_copy", "alias_copy", "permute_copy", "mul"}
    assert any("15 of 16 layers in int8" in note for note in artifact.notes)


def test_it_generates_with_portable_operators(tmp_path: Path) -> None:
    exporter = ExecuTorchExporter(attention="portable")
    # One layer, and only its head quantized: each operator takes time to lower.
    torch.manual_seed(0)
    small = CausalLM({**lm.CONFIG, "num_hidden_layers": 1}).eval()
    model = qaware.quantize(small, {"rules": [{"name": "*lm_head", "scheme": INT8}]}, runtimes=["executorch"])
    artifact = lm.export(exporter, model, tmp_path)
    lm.require_generation(exporter, model, artifact)
    assert not any("llama::" in note for note in artifact.notes)


def test_the_program_says_what_it_takes(artifact: Artifact) -> None:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(artifact.path)
    said = {
        name: program.load_method(name).execute([])[0]
        for name in program.method_names
        if name.startswith(("get_", "use_", "enable_"))
    }
    assert said == {
        "get_max_context_len": lm.CONTEXT,
        "get_max_seq_len": lm.LONGEST,
        "get_vocab_size": lm.VOCABULARY,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def test_what_does_not_fit_is_refused(artifact: Artifact) -> None:
    with open_artifact(artifact.path) as runner:
        with pytest.raises(QawareError, match="tokens 40 to 50 do not fit into a cache of 48"):
            runner.step(lm.text(10), 40)
        with pytest.raises(QawareError, match="seq is 17, must be 1 to 16"):
            runner.step(lm.text(17), 0)


def test_a_single_head_is_left_to_portable_operators(model: QuantizedModel) -> None:
    exporter = ExecuTorchExporter()
    assert exporter._step(model.module, CacheSpec(8, ((2, 16), (2, 16)))) is KernelStep
    assert exporter._step(model.module, CacheSpec(8, ((1, 16), (1, 16)))) is PortableStep


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(QawareError, match="attention: 'flash' is not one of kernel, portable"):
        ExecuTorchExporter(attention="flash")
