"""Models of many kinds to tract: what can be traced, and what an export leaves alone."""

from __future__ import annotations

import copy
import getpass
import logging
import socket
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import SIGNATURE, TinyLM, quantize, tokens
from torch import Tensor, nn
from tract_tools import INT4, NOISE, convert, distance, everywhere, make, tiny

from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.exporters.signature import Signature, TensorSpec
from qaware.recipe import Recipe


class Wrapped(nn.Module):
    """A model of transformers with the mask that tract accepts, and a property that raises as
    LightningModule.trainer does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def trainer(self) -> None:
        raise RuntimeError("not attached to a Trainer")

    def forward(self, input_ids: Tensor) -> Tensor:
        if not torch.jit.is_tracing():
            return self.model(input_ids=input_ids, use_cache=False).logits
        at = torch.arange(input_ids.shape[1])
        mask = torch.where(at[None, :] > at[:, None], -1e4, 0.0)[None, None]
        output = self.model(input_ids=input_ids, attention_mask=mask, position_ids=at[None], use_cache=False)
        return output.logits


BATCHED = Signature(
    (TensorSpec("input_ids", "int64", ("batch", "seq"), 0, 95),), {"batch": (1, 4), "seq": (1, 64)}
)


@pytest.mark.parametrize(
    ("recipe", "tie"),
    [("int8-dynamic-int4-weight", False), ("int8-dynamic-int4-weight", True), ("int8-dynamic", True)],
)
def test_llama_with_grouped_query_attention(tmp_path: Path, recipe: str, tie: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    quantized = convert(Wrapped(LlamaForCausalLM(config)), recipe)
    made = make(quantized, tmp_path / "a.nnef.tgz", BATCHED, tokens(3))
    lengths = [(tokens(n, n),) for n in (1, 2, 17, 64)]
    assert distance(made, *lengths).relative < NOISE
    assert distance(made, (tokens(22).view(2, 11),)).relative < NOISE
    assert "module.model.model.embed_tokens.weight.dat" in made.files
    assert ("module.model.lm_head.weight.dat" in made.files) is not tie


def test_gpt2_whose_layers_are_addmm(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    made = make(
        convert(Wrapped(GPT2LMHeadModel(config)), "int4-weight-only"),
        tmp_path / "a.nnef.tgz",
        SIGNATURE,
        tokens(3),
    )
    assert distance(made, (tokens(1),), (tokens(40),)).relative < NOISE


class Positions(nn.Module):
    """A table that is cut to the length, which tract accepts only for a length with two bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(96, 64), nn.Linear(64, 96)
        self.register_buffer("positions", torch.randn(64, 64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids) + self.positions[: ids.shape[1]])


def test_a_table_cut_to_the_length(tmp_path: Path) -> None:
    made = make(convert(Positions(), everywhere(INT4)), tmp_path / "a.nnef.tgz", SIGNATURE, tokens(5))
    assert distance(made, (tokens(1),), (tokens(40),), (tokens(64),)).relative < NOISE


class Keywords(nn.Module):
    """Two inputs that share axes, one by keyword; a layer used twice under two names; one never used;
    an output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.first = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.again = self.first
        self.unused = nn.Linear(64, 32)

    def forward(self, ids: Tensor, *, gain: Tensor) -> dict[str, Tensor]:
        return {"y": self.again(self.first(self.table(ids))) * gain.unsqueeze(-1)}


@pytest.mark.parametrize("scheme", [INT4, {"bits": 8}, {"bits": 16}], ids=str)
def test_keywords_shared_modules_and_unused_layers(tmp_path: Path, scheme: dict) -> None:
    signature = Signature(
        (
            TensorSpec("token.ids", "int64", ("b", "n"), 0, 49),
            TensorSpec("gain", "float32", ("b", "n"), keyword="gain"),
        ),
        {"b": (1, 4), "n": (1, 20)},
    )
    example = torch.arange(6).view(2, 3), torch.randn(2, 3)
    made = make(convert(Keywords(), everywhere(scheme)), tmp_path / "a.nnef.tgz", signature, *example)
    assert distance(made, (torch.arange(40).view(4, 10), torch.randn(4, 10))).relative < NOISE
    assert "module.first.0.weight.dat" in made.files
    assert not {"module.again.0.weight.dat", "module.unused.weight.dat"} & set(made.files)


class Untraceable(nn.Module):
    def __init__(self, problem: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.problem = nn.Embedding(96, 64), problem

    def forward(self, ids: Tensor) -> Tensor:
        return self.problem(self.table(ids))


def _raise(x: Tensor) -> Tensor:
    if torch.jit.is_tracing():
        raise RuntimeError("not today")
    return x


@pytest.mark.parametrize(("problem", "why"), [(_raise, "not today"), (torch.erfinv, "erfinv")])
def test_what_torch_to_nnef_cannot_do_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: Callable[[Tensor], Tensor], why: str
) -> None:
    with pytest.raises(QawareError, match=why) as caught:
        make(convert(Untraceable(problem), everywhere(INT4)), tmp_path / "a.nnef.tgz", SIGNATURE, tokens(3))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_export_leaves_the_model_as_it_was_and_trainable(tmp_path: Path) -> None:
    model = TinyLM(tie=True)
    plan = Recipe.load("int8-dynamic-int4-weight").match(model)
    engine = ModulesEngine()
    engine.prepare(model, plan)
    quantized = engine.convert(copy.deepcopy(model), plan)
    before = {n: (type(p), p.requires_grad) for n, p in quantized.module.named_parameters()}
    output = quantized.module(tokens(9))
    make(quantized, tmp_path / "a.nnef.tgz", SIGNATURE, tokens(3))
    assert {n: (type(p), p.requires_grad) for n, p in quantized.module.named_parameters()} == before
    assert torch.equal(quantized.module(tokens(9)), output)
    model.train()(tokens(9)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_export_leaves_no_trace_in_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch_to_nnef.inference_target import tract as target

    def fail(*_: object) -> None:
        raise AssertionError("tract's command line would be downloaded")

    monkeypatch.setattr(target.TractBinaryDownloader, "__init__", fail)
    quantized = quantize("int8-dynamic")

    def state() -> tuple[object, ...]:
        return (
            torch._dynamo.config.suppress_errors,
            torch._jit_internal.module_has_exports,
            target.TractCli.__dict__["download"],
            logging.getLogger("torch_to_nnef").level,
            list(warnings.filters),
            torch.is_grad_enabled(),
            torch.get_rng_state().sum(),
        )

    monkeypatch.setattr(logging.getLogger("torch_to_nnef"), "level", 17)
    before = state()
    make(quantized, tmp_path / "a.nnef.tgz", SIGNATURE, tokens(3))
    assert state() == before
    assert capsys.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nnef.tgz", "a.nnef.tgz.json"]


def test_what_torch_to_nnef_sets_on_import_is_undone() -> None:
    from torch._dynamo import config

    from qaware.exporters.tract import _contained

    before = config.suppress_errors
    with _contained():
        config.suppress_errors = not before
    assert config.suppress_errors is before


def test_the_file_does_not_say_who_made_it() -> None:
    made = tiny("int4-weight-only")
    text = made.files["graph.nnef"].decode()
    assert not [word for word in (socket.gethostname(), sys.argv[0], '"user"', '"hostname"') if word in text]
    with tarfile.open(made.artifact.path) as archive:
        assert {(m.uname, m.gname, m.uid, m.mtime) for m in archive.getmembers()} == {("", "", 0, 0)}
    assert getpass.getuser() not in made.files
