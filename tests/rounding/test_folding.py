"""Scales find their way into the layers before, in models of many kinds, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import WIDTH, Decoder, called, ids
from torch import Tensor, nn

from qaware.engines.example import Example
from qaware.errors import QawareError
from qaware.rounding.folding import Fold, SameOutputs, apply_scales, per_channel, usable
from qaware.rounding.folding_probe import channel_maps
from qaware.rounding.folding_search import find_folds
from qaware.rounding.recording import Call


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]


def folded(model: nn.Module, recording: list[Call]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """What is found, by producer; checks that finding changes nothing and that all can be used together."""
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folds, reasons = find_folds(model, recording, linears(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    outputs = SameOutputs(model, recording)
    for fold in folds:
        apply_scales(model, fold, 0.5 + 2 * torch.rand(fold.size))
    changed = {
        name.rpartition(".")[0] for name, v in model.state_dict().items() if not torch.equal(v, before[name])
    }
    assert changed == {name for fold in folds for name in (fold.producer, *fold.consumers)}
    outputs.require(model, "awq")
    return {fold.producer: fold.consumers for fold in folds}, reasons


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_of_ones_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Decoder().to(dtype).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "before" in name or "after" in name:
            nn.init.normal_(parameter, 1.0)
    found, reasons = folded(model, called(ids()))
    assert found == {
        "before": ("attention.qkv",),
        "attention.qkv": ("attention.out",),
        "between": ("gate_up",),
        "gate_up": ("down",),
        "after": ("head",),
    }
    assert reasons == {}


def test_heads_that_share_values_share_the_scale() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    (fold,) = (f for f in find_folds(model, called(ids()), ["attention.out"])[0] if "qkv" in f.producer)
    assert (fold.first, fold.size) == (12, 4)
    assert fold.channels.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert per_channel(fold, torch.arange(8.0), "mean").tolist() == [1, 2, 5, 6]
    assert per_channel(fold, torch.arange(8.0), "amax").tolist() == [2, 3, 6, 7]


def test_a_tied_weight_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Decoder()
    model.head.weight = model.embed.weight
    found, reasons = folded(model, called(ids()))
    assert "after" not in found
    assert reasons == {"head": "its weight is tied to another layer's"}


class Unit(nn.RMSNorm):
    """A norm that multiplies with one more than its weight, as Gemma's does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (WIDTH,)) * (1 + self.weight)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(Unit(WIDTH), nn.Linear(WIDTH, 4)), {"0": ("1",)}),
        (nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)), {"0": ("2",)}),
        (nn.Sequential(nn.Linear(4, WIDTH), nn.GELU(), nn.Linear(WIDTH, 4)), {}),
        (nn.Sequential(nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 4)), {}),
        (nn.Sequential(nn.Linear(4, WIDTH), nn.Softmax(-1), nn.Linear(WIDTH, 4)), {}),
    ],
)
def test_what_is_between_decides(model: nn.Sequential, expected: dict[str, tuple[str, ...]]) -> None:
    torch.manual_seed(0)
    width = WIDTH if not isinstance(model[0], nn.Linear) else 4
    found, reasons = folded(model, called(rows(5, width)))
    assert found == expected
    assert set(reasons.values()) <= {"nothing before it takes the scale"}


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    found, reasons = folded(model, called(rows(2, 3, 6, 6)))
    assert found == {"1": ("3",), "3": ("7",)}
    assert reasons == {"0": "nothing before it takes the scale"}


def test_a_grouped_convolution_takes_no_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 2, 1))
    found, reasons = folded(model, called(rows(2, 2, 9)))
    assert found == {"2": ("3",)}
    assert reasons["2"] == "it has no plain weight, or one in groups"


@pytest.mark.parametrize("first", [True, False])
def test_an_encoder_layer_of_torch(first: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(WIDTH, 2, 16, activation="relu", batch_first=True, norm_first=first)
    found, _ = folded(model, called(rows(2, 5, WIDTH)))
    # After a residual that the norm is a part of, its output has another reader.
    assert found == ({"norm2": ("linear1",)} if first else {}) | {"linear1": ("linear2",)}


LLAMA = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
PHI = {
    "input_layernorm": ("self_attn.qkv_proj",),
    "self_attn.qkv_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_up_proj",),
    "mlp.gate_up_proj": ("mlp.down_proj",),
}


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    ("kind", "expected"), [("llama", LLAMA), ("gemma", LLAMA), ("phi3", PHI), ("gpt2", {})]
)
def test_models_of_transformers(kind: str, expected: dict[str, tuple[str, ...]], cache: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "vocab_size": 32,
        "head_dim": 4,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    if kind == "gpt2":
        sizes, heads = {"n_embd": 16, "n_layer": 1, "vocab_size": 32}, {"n_head": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    found, reasons = folded(model, called(input_ids=ids(), use_cache=cache))
    inner = "model.layers.0."
    assert {
        k.removeprefix(inner): tuple(n.removeprefix(inner) for n in v) for k, v in found.items()
    } == expected
    assert reasons == {"lm_head": "its weight is tied to another layer's"}


class Noisy(nn.Module):
    """Draws random numbers when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + torch.randn_like(x)))


def test_a_model_that_draws_random_numbers() -> None:
    torch.manual_seed(0)
    assert folded(Noisy(), called(rows(5, WIDTH))) == ({"norm": ("out",)}, {})


def test_a_model_that_changes_its_inputs() -> None:
    class InPlace(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(x.mul_(2)))

    torch.manual_seed(0)
    x = rows(5, WIDTH)
    assert folded(InPlace(), recording := called(x.clone())) == ({"norm": ("out",)}, {})
    assert torch.equal(recording[0].example.args[0], x)


class Reader(nn.Module):
    """Gives what its norm makes to one linear layer, or two, or several times, or to the caller too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        if self.kind == "caller":
            return self.a(x), x
        if self.kind == "twice":
            return self.a(x) + self.a(x.flip(0))
        if self.kind == "expert":  # b is for a kind of input that the first batch has none of
            return self.b(x) if x.sum() > 1e6 else self.a(x)
        return self.a(x) * self.b(x.clone())


@pytest.mark.parametrize(
    ("kind", "expected", "reason"),
    [
        ("both", {"norm": ("a", "b")}, None),
        ("caller", {}, "nothing before it takes the scale"),
        ("twice", {}, "it runs several times in a call"),
        ("expert", {}, "norm may feed layers that did not run on the first batch"),
    ],
)
def test_who_reads(kind: str, expected: dict[str, tuple[str, ...]], reason: str | None) -> None:
    torch.manual_seed(0)
    found, reasons = folded(Reader(kind), called(rows(5, WIDTH)))
    assert found == expected
    assert reasons.get("a") == reason
    assert reasons.get("b") in (None, "it never ran in calibration")


def test_a_step_that_goes_past_forward() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4), nn.ReLU()),
            "head": nn.Linear(4, 2),
        }
    )
    recording = [Call("body", Example((rows(5, WIDTH),))), Call("head", Example((rows(5, 4),)))]
    found, reasons = folded(model, recording)
    assert found == {"body.0": ("body.1",)}
    assert reasons == {"head": "nothing before it takes the scale"}


def test_a_model_that_computes_something_else_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))
    outputs = SameOutputs(model, called(rows(5, WIDTH)))
    apply_scales(model, Fold("0", 0, WIDTH, 0.0, (), torch.arange(WIDTH)), torch.full((WIDTH,), 2.0))
    with pytest.raises(QawareError, match="awq changed what Sequential computes"):
        outputs.require(model, "awq")


def test_channel_maps() -> None:
    assert [m.tolist() for m in channel_maps(3, 3)] == [[0, 1, 2]]
    assert [m.tolist() for m in channel_maps(2, 4)] == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert list(channel_maps(3, 4)) == []


def test_broken_scales_are_left_out() -> None:
    scales = usable(torch.tensor([0.0, float("inf"), float("nan"), 1e9, 2.0]))
    assert scales.tolist() == [1.0, 1.0, 1.0, 1e4, 2.0]
