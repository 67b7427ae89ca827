"""AOTInductor on its real runtime. Compiling is slow, so three files serve every test."""

from __future__ import annotations

import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qaware import QawareError, Scheme, machine, recipe_names
from qaware.engines.base import QuantizedModel, QuantizedWeight, float_bytes
from qaware.engines.modules import ModulesEngine
from qaware.exporters import get_exporter
from qaware.exporters.aoti import AOTIExporter
from qaware.exporters.aoti_layers import BlockedWeight
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Runner
from qaware.exporters.isolated import IsolatedRunner
from qaware.exporters.packed import PackedWeight, StoredWeight
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import compare
from qaware.plan import Decision
from qaware.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SIGNATURE, quantize, tokens

MIXED = {
    "name": "mixed",
    "rules": [
        {"role": "embedding", "scheme": {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}},
        {
            "name": "qkv",
            "scheme": {
                "bits": 4,
                "group_size": 32,
                "activation": "int8-dynamic",
                "scale_dtype": "bfloat16",
            },
        },
        {"name": "attn_out", "scheme": {"bits": 8, "activation": "int8-static"}},
        {
            "name": "gate_proj",
            "scheme": {"bits": 3, "group_size": 16, "symmetric": False, "scale_dtype": "float16"},
        },
        {"name": "down_proj", "scheme": {"bits": 16}},
        {"name": "lm_head", "scheme": {"bits": 8}},
    ],
}
EXPORTER = AOTIExporter()


@dataclass
class Exported:
    quantized: QuantizedModel
    artifact: Artifact
    run: Runner
    constants: dict[str, Tensor]

    def same(self, *inputs: Tensor) -> None:
        assert compare(self.run, self.quantized.module, [inputs]).within(EXPORTER.tolerance)


def export(quantized: QuantizedModel, example: Tensor, signature: Signature, path: Path) -> Exported:
    before = Path.cwd()
    os.chdir(path.parent / "cwd")
    try:
        artifact = EXPORTER.export(quantized, (example,), signature, path)
    finally:
        os.chdir(before)
    return Exported(quantized, artifact, EXPORTER.open(path, signature), constants_in(path))


def constants_in(path: Path) -> dict[str, Tensor]:
    """What the compiled library holds, read back by torch's own runner."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".so")]
        library = archive.extract(name, path.parent / "unpacked")
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)
    return {k.removeprefix("module."): v.clone() for k, v in runner.extract_constants_map(False).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a subfolder to be the working directory, to see what is left there."""
    path = tmp_path_factory.mktemp("aoti")
    (path / "cwd").mkdir()
    return path


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Exported:
    quantized = quantize(MIXED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return export(quantized, tokens(1), SIGNATURE, folder / "mixed.pt2")


def test_the_compiler_is_the_only_requirement() -> None:
    assert get_exporter("aoti").missing() is None
    with torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        assert EXPORTER.missing() == (
            "aoti: no C++ compiler was found; install g++ (apt install g++) or name one in CXX"
        )


def test_nothing_is_refused() -> None:
    for bits in (*range(1, 9), 16):
        for kind in ("Linear", "Embedding"):
            assert EXPORTER.refuse(Decision("a.weight", "a", kind, (8, 8), None, Scheme(bits), "")) is None
    for name in recipe_names():
        assert EXPORTER.refuse_plan(quantize(name).plan) is None


@pytest.mark.parametrize("length", [1, 2, 3, 16, 63, 64])
def test_every_length_computes_what_the_converted_model_computes(mixed: Exported, length: int) -> None:
    for seed in range(5):
        mixed.same(tokens(length, seed))


def test_the_difference_is_float_noise_where_no_activation_moves(mixed: Exported) -> None:
    parities = [compare(mixed.run, mixed.quantized.module, [(tokens(16, seed),)]) for seed in range(9)]
    assert sorted(p.relative for p in parities)[4] < 1e-4  # 16 bits enter the weight-only head


def test_strides_of_an_input_do_not_matter(mixed: Exported) -> None:
    wide = tokens(64).repeat_interleave(2, 1)
    assert torch.equal(mixed.run(wide[:, ::2]), mixed.run(tokens(64)))


def test_output_is_a_float32_tensor_of_its_own(mixed: Exported) -> None:
    first = mixed.run(tokens(5))
    kept = first.clone()
    mixed.run(tokens(5, seed=1))
    assert first.dtype == torch.float32
    assert torch.equal(first, kept)


def test_the_file_holds_the_integers_unchanged(mixed: Exported) -> None:
    for name, weight in mixed.quantized.weights.items():
        if weight.scheme.is_float:
            found = mixed.constants[f"{name}.weight"]
            assert found.dtype == torch.float16
            assert torch.equal(found, weight.data)
        else:
            stored = stored_weight(mixed.constants, name, weight)
            assert torch.equal(stored.integers(), weight.data)
            assert torch.equal(stored.grid()[0], weight.scale)
            assert torch.equal(stored.dequantize(), weight.dequantize())


def stored_weight(constants: dict[str, Tensor], name: str, weight: QuantizedWeight) -> StoredWeight:
    """A packed weight whose buffers are all replaced by what the file holds."""
    stored = BlockedWeight(weight) if f"{name}.packed.codes" in constants else PackedWeight(weight)
    expected = dict(stored.named_buffers())
    for key, buffer in expected.items():
        found = constants[f"{name}.packed.{key}"]
        assert (found.dtype, found.shape) == (buffer.dtype, buffer.shape)
        setattr(stored, key, found)
    return stored


def test_integers_take_their_width_and_scales_their_precision(mixed: Exported) -> None:
    assert {k: v.dtype for k, v in mixed.constants.items() if "packed" in k} == {
        "embed.packed.plane4": torch.uint8,
        "embed.packed.scale": torch.bfloat16,
        "qkv.packed.codes": torch.uint8,
        "qkv.packed.scale": torch.bfloat16,
        "attn_out.packed.codes": torch.uint8,
        "attn_out.packed.scale": torch.float32,
        "gate_proj.packed.plane2": torch.uint8,
        "gate_proj.packed.plane1": torch.uint8,
        "gate_proj.packed.scale": torch.float16,
        "gate_proj.packed.zero_point": torch.int8,
        "lm_head.packed.codes": torch.uint8,
        "lm_head.packed.scale": torch.float32,
    }


def test_export_leaves_the_model_and_the_folder_alone(mixed: Exported, folder: Path) -> None:
    assert torch.equal(mixed.quantized.module(tokens(9)), quantize(MIXED).module(tokens(9)))
    assert list((folder / "cwd").iterdir()) == []
    assert {p.name for p in folder.glob("mixed*")} == {"mixed.pt2", "mixed.pt2.json"}


def test_the_archive_is_not_named_after_the_temporary_file(mixed: Exported) -> None:
    with zipfile.ZipFile(mixed.artifact.path) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"archive"}


def test_loading_needs_no_compiler_and_leaves_nothing(
    mixed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cache", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    with IsolatedRunner(mixed.artifact) as run:
        assert torch.equal(run(tokens(7)), mixed.run(tokens(7)))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert list((tmp_path / "temporary").glob("*aoti*")) == []


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def one_bit(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("damage", [half, one_bit, lambda _: b"", lambda _: b"no archive"])
def test_a_damaged_file_is_one_line(
    mixed: Exported, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "damaged.pt2"
    path.write_bytes(damage(mixed.artifact.path.read_bytes()))
    with pytest.raises(QawareError, match=r"damaged\.pt2: AOTInductor cannot load it") as error:
        EXPORTER.open(path, SIGNATURE)
    assert "\n" not in str(error.value)


def test_another_archive_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(QawareError, match="AOTInductor cannot load it") as error:
        EXPORTER.open(path, SIGNATURE)
    assert "\n" not in str(error.value)


@pytest.mark.skipif("avx2" not in machine.cpu()["features"], reason="names x86 features")
def test_a_cpu_without_the_features_is_told(mixed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu", lambda: {"features": []})
    with pytest.raises(QawareError, match=r"compiled for a CPU with .*AVX.*which this one lacks"):
        EXPORTER.open(mixed.artifact.path, SIGNATURE)


class Wide(nn.Module):
    """Almost only weights: one 4096 x 256 table that is the embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4096, 256)
        self.lm_head = nn.Linear(256, 4096, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, *, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.lm_head(self.embed(ids))}


def converted(model: nn.Module, recipe: str) -> QuantizedModel:
    plan = Recipe.load(recipe).match(model)
    return ModulesEngine().convert(ModulesEngine().prepare(model.eval(), plan), plan)


def test_int4_is_an_eighth_and_a_tied_table_is_stored_once(folder: Path) -> None:
    torch.manual_seed(0)
    signature = Signature((TensorSpec("ids", "int64", (1, "n"), 0, 4095, keyword="ids"),), {"n": (1, 8)})
    before = float_bytes(Wide())
    wide = export(converted(Wide(), "int4-weight-only"), tokens(1), signature, folder / "wide.pt2")
    for length in (1, 8):
        expected = wide.quantized.module(ids=tokens(length))["logits"]
        assert (wide.run(tokens(length)) - expected).abs().mean() < 1e-4 * expected.std()
    stored = sum(t.numel() * t.element_size() for t in wide.constants.values())
    assert stored == wide.quantized.bytes == before * 4.5 / 32  # 4 bits and a bfloat16 for 32 weights
    # The rest is code, which does not grow with the weights: 0.45 MB here.
    assert wide.artifact.bytes - stored < 700_000
    assert wide.artifact.bytes < before / 3


class Llama(nn.Module):
    """transformers builds its mask in ways that torch.export cannot trace, so it is given one."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        given = {}
        if torch.compiler.is_exporting():
            length = input_ids.shape[1]
            mask = torch.full((length, length), float("-inf")).triu(1)
            given = {"attention_mask": mask[None, None], "position_ids": torch.arange(length)[None]}
        return self.model(input_ids=input_ids, use_cache=False, **given).logits


def test_a_transformers_model_with_two_dynamic_axes(folder: Path) -> None:
    torch.manual_seed(0)
    signature = Signature(
        (TensorSpec("input_ids", "int64", ("batch", "seq"), 0, 95),), {"batch": (1, 3), "seq": (1, 64)}
    )
    llama = export(converted(Llama(), "int4-weight-only"), tokens(1), signature, folder / "llama.pt2")
    for batch, length in ((1, 1), (1, 2), (2, 1), (3, 3), (2, 64)):
        llama.same(tokens(batch * length, seed=length).view(batch, length))
    assert "model.model.embed_tokens.packed.codes" not in llama.constants  # tied: under the head's name
