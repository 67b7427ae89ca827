"""Language models on tract: a key-value cache, and Q4_0 weights for one token and for many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tract_tools import EXPORTER, INT4, convert, everywhere

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.decode import decode
from qaware.exporters.generation import CachedRunner
from qaware.exporters.isolated import IsolatedRunner
from qaware.lm import CausalLM
from qaware.tasks import language_signature

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
NOISE = 3e-6
"""Measured at most 7e-7; one int4 that is a step off is 3e-5."""
VOCABULARY = 96
SIGNATURE = language_signature("input_ids", VOCABULARY, 24)


class Exported:
    """A converted language model, its archive and a runner."""

    def __init__(self, kind: str, folder: Path, recipe: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        model = CausalLM({**KINDS[kind], "vocab_size": VOCABULARY, "tie_word_embeddings": False}).eval()
        # Unlike those of a new model, logits with a clear winner.
        for weight in (p for p in model.parameters() if p.dim() > 1):
            nn.init.normal_(weight, std=0.2)
        self.quantized: QuantizedModel = convert(model, recipe or everywhere(INT4))
        self.exporter = get_exporter({"tract": options})
        path = folder / f"{kind}.nnef.tgz"
        self.artifact: Artifact = self.exporter.export(self.quantized, (ids(5),), SIGNATURE, path)
        self.runner: Any = self.exporter.open(path, SIGNATURE)
        self.reference = self.exporter.reference(self.quantized)


def ids(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(count))


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().mean() / wanted.std())


@pytest.fixture(scope="module", params=sorted(KINDS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp("tract"))


def test_the_cache_is_as_long_as_the_context(exported: Exported) -> None:
    assert isinstance(exported.runner, CachedRunner)
    assert exported.runner.length == exported.artifact.details["cache"]["length"] == 64
    assert exported.runner.most == 24


@torch.no_grad()
@pytest.mark.parametrize("parts", [(24,), (1, 1, 1), (9, 1, 1, 2, 11, 24, 16)], ids=str)
def test_parts_compute_what_the_whole_text_computes(exported: Exported, parts: tuple[int, ...]) -> None:
    text, start = ids(sum(parts)), 0
    wanted = exported.reference(text)
    for count in parts:
        got = exported.runner.step(text[:, start : start + count], start)
        assert difference(got, wanted[:, start : start + count]) < NOISE
        start += count


@torch.no_grad()
def test_whole_texts_and_rewound_steps_forget_what_was_held(exported: Exported) -> None:
    first, second = ids(20), ids(21)
    exported.runner(first)
    assert difference(exported.runner(second), exported.reference(second)) < NOISE
    mixed = torch.cat([second[:, :7], first[:, :3]], 1)
    assert difference(exported.runner.step(mixed[:, 7:], 7), exported.reference(mixed)[:, 7:]) < NOISE


def test_a_step_behind_tokens_that_were_not_given_is_refused(exported: Exported) -> None:
    exported.runner(ids(4))
    with pytest.raises(QawareError, match="step at 6, but only 4 tokens were given"):
        exported.runner.step(ids(1), 6)


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_reference(exported: Exported) -> None:
    text = ids(6)
    with IsolatedRunner(exported.artifact) as runner:
        generated = runner.generate(text, 30)
    assert list(generated[0, 6:]) == list(decode(exported.runner, text, 30))
    for at in range(6, 36):
        assert int(exported.reference(generated[:, :at])[0, -1].argmax()) == int(generated[0, at])


@torch.no_grad()
@pytest.mark.parametrize("prefill", ["float", "packed"])
def test_both_forms_of_packed_weights_compute_the_same(tmp_path: Path, prefill: str) -> None:
    made = Exported("llama", tmp_path, prefill=prefill, cache_length=40)
    assert made.runner.length == 40
    programs = made.runner._step.programs
    assert [made.runner(ids(n)).shape for n in (1, 2)] == [(1, 1, VOCABULARY), (1, 2, VOCABULARY)]
    assert programs._floats is None
    assert difference(made.runner(ids(3)), made.reference(ids(3))) < NOISE
    assert (programs._floats is not None) == (prefill == "float")
    assert any("float32, 32 bits each in memory" in note for note in made.artifact.notes) == (
        prefill == "float"
    )


def test_expanded_weights_are_the_integers_times_their_scale(exported: Exported, tmp_path: Path) -> None:
    import nnef

    from qaware.exporters.tract_archive import expand

    expand(exported.artifact.path, tmp_path)
    name = next(iter(exported.quantized.weights))
    (file,) = tmp_path.glob(f"*{name}.weight.dat")
    with file.open("rb") as content:
        expanded = nnef.read_tensor(content)
    assert np.array_equal(expanded, exported.quantized.weights[name].dequantize().numpy())


def test_other_values_of_prefill_are_refused() -> None:
    with pytest.raises(QawareError, match="prefill: 'int8' is not one of float, packed"):
        get_exporter({"tract": {"prefill": "int8"}})


def test_a_model_without_a_cache_has_none() -> None:
    from tract_tools import tiny

    made = tiny("int4-weight-only")
    assert not isinstance(made.run, CachedRunner)
    assert "cache" not in made.artifact.details
    assert EXPORTER.cache_length is None
