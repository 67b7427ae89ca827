"""The modules engine: what is trained with are the integers that ship, and nothing else changes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.base import QuantizedModel, float_bytes, packed_bytes
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.observers import observers
from qaware.plan import Plan
from qaware.recipe import Recipe, Rule, recipe_names
from qaware.scheme import ACTIVATIONS, SCALE_DTYPES, Scheme

ENGINE = ModulesEngine()
SEEDS = 20
WIDTH, VOCABULARY = 64, 24


class Net(nn.Module):
    """Embedding, a layer with a bias, one without, and a head; ``tie`` shares embedding and head."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, 96)
        self.down = nn.Linear(96, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))


def every_layer(scheme: Scheme) -> Recipe:
    return Recipe("all", (Rule(scheme, type="Linear"), Rule(scheme, type="Embedding")))


def prepare(model: nn.Module, recipe: Recipe | str) -> Plan:
    plan = Recipe.load(recipe).match(model)
    assert ENGINE.prepare(model, plan) is model
    return plan


def calibrate(model: nn.Module, *args: Tensor) -> None:
    for observer in observers(model):
        observer.observing = True
    with torch.no_grad():
        model(*args)
    for observer in observers(model):
        observer.observing = False


def build(recipe: Recipe | str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: bool):  # type: ignore[no-untyped-def]
    """A prepared (and calibrated) model and its conversion."""
    torch.manual_seed(seed)
    model = Net(**options).to(dtype).eval()
    # Real weights have scales of all sizes and rows of zeros (an unused token).
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10.0 ** (seed % 5 - 3)
        model.embed.weight[3] = 0
    plan = prepare(model, recipe)
    calibrate(model, ids(seed))
    return model, ENGINE.convert(copy.deepcopy(model), plan)


def assert_agree(prepared: nn.Module, quantized: QuantizedModel, *args: Tensor) -> None:
    with torch.no_grad():
        expected, found = prepared(*args), quantized.module(*args)
    # Relative to the largest output: some models here have outputs of 1e-6.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", recipe_names())
def test_prepared_and_converted_agree_for_every_named_recipe(name: str) -> None:
    for seed in range(SEEDS):
        prepared, quantized = build(name, seed, tie=bool(seed % 2))
        assert_agree(prepared, quantized, ids(seed + 1))
        assert bool(quantized.module(ids()).any())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_prepared_and_converted_agree_for_every_scheme(bits: int, activation: str) -> None:
    schemes = itertools.product((0, 32), (True, False), SCALE_DTYPES)
    for seed, (group, symmetric, dtype) in enumerate(schemes):
        scheme = Scheme(bits, group, activation, symmetric, dtype)
        prepared, quantized = build(every_layer(scheme), seed)
        assert_agree(prepared, quantized, ids(seed + 1))
        low, high = scheme.range
        for weight in quantized.weights.values():
            assert low <= int(weight.data.min())
            assert int(weight.data.max()) <= high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_low_precision_models_agree_exactly(dtype: torch.dtype, activation: str, scale_dtype: str) -> None:
    for seed in range(2):
        scheme = Scheme(4, 32, activation, seed % 2 == 0, scale_dtype)
        prepared, quantized = build(every_layer(scheme), seed, dtype)
        with torch.no_grad():
            output = quantized.module(ids())
            assert torch.equal(output, prepared(ids()))
        assert output.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float16_weights_in_a_low_precision_model(dtype: torch.dtype) -> None:
    prepared, quantized = build("float16", 0, dtype, tie=True)
    with torch.no_grad():
        assert torch.equal(quantized.module(ids()), prepared(ids()))


@pytest.mark.parametrize("name", recipe_names())
def test_both_agree_under_autocast(name: str) -> None:
    prepared, quantized = build(name, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(quantized.module(ids()), prepared(ids()))


@pytest.mark.parametrize("name", recipe_names())
def test_a_model_cast_after_prepare_agrees(name: str) -> None:
    # Lightning's bf16-true casts the module after the callbacks' setup.
    torch.manual_seed(0)
    model = Net().eval()
    plan = prepare(model, name)
    model.to(torch.bfloat16)
    calibrate(model, ids())
    quantized = ENGINE.convert(copy.deepcopy(model), plan)
    with torch.no_grad():
        assert torch.equal(quantized.module(ids()), model(ids()))


def test_quantization_does_something_and_fewer_bits_do_more() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    errors = []
    for bits in (16, 8, 4, 2):
        copied = copy.deepcopy(model)
        prepare(copied, every_layer(Scheme(bits)))
        with torch.no_grad():
            errors.append(float((copied(ids()) - model(ids())).abs().mean()))
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]


def test_the_encoder_layer_that_reads_weights_itself_is_quantized_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, pad = torch.randn(2, 5, WIDTH), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        exact = model(x)
        plan = prepare(model, "int4-weight-only")
        quantized = ENGINE.convert(copy.deepcopy(model), plan)
        assert float((model(x) - exact).abs().max()) > 1e-2
        assert_agree(model, quantized, x)
        torch.testing.assert_close(
            model(x, src_key_padding_mask=pad),
            quantized.module(x, src_key_padding_mask=pad),
            rtol=1e-6,
            atol=1e-6,
        )


def test_identity_names_hooks_flags_and_keys_survive_prepare() -> None:
    model = Net(tie=True)
    model.eval()
    model.up.train()
    modules = {name: id(m) for name, m in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    modes = {name: m.training for name, m in model.named_modules()}
    keys, seen = list(model.state_dict()), []
    model.up.register_forward_hook(lambda *_: seen.append("hook"))
    model.up.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.up.my_note = "kept"
    prepare(model, "int8-dynamic-int4-weight")
    model(ids()).sum().backward()
    assert seen == ["hook", "backward"]
    assert model.up.my_note == "kept"
    assert {n: id(m) for n, m in model.named_modules() if "fake_quantizer" not in n} == modules
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert {n: m.training for n, m in model.named_modules() if "fake_quantizer" not in n} == modes
    assert model.up.weight_fake_quantizer.training
    assert not model.down.weight_fake_quantizer.training
    assert [key for key in model.state_dict() if not key.endswith("weight_fake_quantizer.bits")] == keys
    assert isinstance(model.up, nn.Linear)
    assert isinstance(model.embed, nn.Embedding)
    assert "forward" not in vars(model.up)


@pytest.mark.parametrize("name", [n for n in recipe_names() if "static" not in n])
def test_checkpoints_of_the_float_model_load_into_the_prepared_one(name: str) -> None:
    model = Net()
    saved = {k: v + 1 for k, v in model.state_dict().items()}
    prepare(model, name)
    model.load_state_dict(saved)
    assert torch.equal(model.up.weight, saved["up.weight"])


@pytest.mark.parametrize("name", recipe_names())
def test_weights_of_a_prepared_model_do_not_load_into_a_float_one(name: str) -> None:
    model = Net()
    prepare(model, name)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up\.weight_fake_quantizer\.bits"):
        Net().load_state_dict(model.state_dict())


def test_a_static_recipe_adds_only_marks_and_observers_to_the_keys() -> None:
    model = Net()
    keys = set(model.state_dict())
    prepare(model, "int8-static")
    added = set(model.state_dict()) - keys
    assert sum(key.endswith("weight_fake_quantizer.bits") for key in added) == 4
    assert sum(key.endswith(("observer.min_val", "observer.max_val")) for key in added) == 2 * 3
    assert len(added) == 4 + 2 * 3
    assert all(v.shape == () for k, v in model.state_dict().items() if k in added)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("name", recipe_names())
def test_a_module_under_two_names_stays_one(name: str) -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(3, WIDTH)
    plan = prepare(model, name)
    calibrate(model, x)
    quantized = ENGINE.convert(copy.deepcopy(model), plan)
    assert model.first is model.second
    assert quantized.module.first is quantized.module.second
    assert list(quantized.weights) == ["first"]
    assert_agree(model, quantized, x)


def test_ties_hold_in_the_prepared_model_and_integers_are_shared_after() -> None:
    prepared, quantized = build("int8-dynamic-int4-weight", tie=True)
    assert prepared.head.weight is prepared.embed.weight
    embed, head = quantized.weights["embed"], quantized.weights["head"]
    assert head is embed
    assert quantized.module.head.weight.qdata.data_ptr() == quantized.module.embed.weight.qdata.data_ptr()
    assert quantized.module.head.weight.activation_quantization == "int8_asym_per_token"
    assert quantized.module.embed.weight.activation_quantization is None


def test_a_tie_between_different_grids_is_two_tables() -> None:
    recipe = Recipe("r", (Rule(Scheme(8), role="embedding"), Rule(Scheme(4, 32), role="head")))
    prepared, quantized = build(recipe, tie=True)
    assert quantized.weights["embed"].scheme.bits == 8
    assert quantized.weights["head"].scheme.bits == 4
    assert quantized.weights["head"].data.abs().max() <= 8
    assert_agree(prepared, quantized, ids())


def test_a_tied_head_that_stays_float_keeps_its_values() -> None:
    recipe = Recipe("r", (Rule(Scheme(4), role="embedding"),))
    prepared, quantized = build(recipe, tie=True)
    assert torch.equal(quantized.module.head.weight, prepared.embed.weight)
    assert_agree(prepared, quantized, ids())


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * F.linear(input, self.weight, self.bias)


def test_a_subclass_is_left_alone_and_reported() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Doubled(WIDTH, WIDTH))
    plan = prepare(model, every_layer(Scheme(4)).prepend(Rule(Scheme(4), name="1")))
    assert type(model[1]) is Doubled
    assert [d.module for d in plan.skipped if "not supported" in d.reason] == ["1", "1"]
    assert list(plan.quantized) == ["0"]


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_an_embedding_keeps_its_options(padding: int | None, max_norm: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding, max_norm=max_norm))
    plan = prepare(model, "int8-weight-only")
    model(ids()).sum().backward()
    assert model[0].weight.grad is not None
    if padding is not None:
        assert float(model[0].weight.grad[padding].abs().sum()) == 0
    assert_agree(model, ENGINE.convert(copy.deepcopy(model), plan), ids())


@pytest.mark.parametrize("name", recipe_names())
def test_training_lowers_the_loss_and_every_weight_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = Net(tie=True).train()
    plan = prepare(model, name)
    for observer in observers(model):
        observer.observing = True
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    targets = ids(5)
    for _ in range(12):
        loss = F.cross_entropy(model(ids()).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    calibrate(model, ids())
    assert_agree(model.eval(), ENGINE.convert(copy.deepcopy(model), plan), ids())


def test_switched_off_it_is_the_float_model() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    exact = model(ids())
    prepare(model, "int8-dynamic-int4-weight")
    set_fake_quant(model, False)
    assert torch.equal(model(ids()), exact)
    quantized = ENGINE.convert(copy.deepcopy(model), Recipe.load("int8-dynamic-int4-weight").match(Net()))
    set_fake_quant(model, True)
    assert_agree(model, quantized, ids())


def test_convert_leaves_evaluation_mode_and_nothing_that_trains() -> None:
    model = Net().train()
    quantized = ENGINE.convert(model, prepare(model, "int8-weight-only"))
    assert quantized.module is model
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith("norm"))
    assert not any("fake_quantizer" in n for n, _ in model.named_modules())
    assert type(model.up) is nn.Linear
    assert type(model.embed) is nn.Embedding


def test_float64_is_refused_before_anything_changes() -> None:
    model = Net()
    model.down.double()
    plan = Recipe.load("int8-weight-only").match(model)
    with pytest.raises(QawareError, match=r"down: weight is torch\.float64; quantization needs float32"):
        ENGINE.prepare(model, plan)
    assert type(model.up) is nn.Linear


def test_an_impossible_plan_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(172, 4))
    with pytest.raises(QawareError, match="1: group_size 32 does not divide its 172"):
        prepare(model, "int4-weight-only")
    assert type(model[0]) is nn.Linear


def test_converting_what_is_not_prepared_is_refused() -> None:
    model = Net()
    plan = Recipe.load("int8-weight-only").match(model)
    with pytest.raises(QawareError, match="embed: is not prepared; call prepare"):
        ENGINE.convert(model, plan)
    ENGINE.prepare(model, plan)
    with pytest.raises(QawareError, match="is not prepared"):
        ENGINE.convert(nn.Linear(2, 2), plan)
    ENGINE.convert(model, plan)
    with pytest.raises(QawareError, match="is not prepared"):
        ENGINE.convert(model, plan)


def test_converting_without_calibration_is_refused() -> None:
    model = Net()
    plan = prepare(model, "int8-static")
    with pytest.raises(QawareError, match="up: int8-static: no finite activation was observed"):
        ENGINE.convert(model, plan)


def test_static_ranges_are_those_that_were_observed() -> None:
    _, quantized = build("int8-static")
    assert set(quantized.activations) == {"up", "down", "head"}
    for name, found in quantized.activations.items():
        layer = quantized.module.get_submodule(name)
        assert (layer.scale, layer.zero_point) == (found.scale, found.zero_point)
        assert found.scale > 0
        assert -128 <= found.zero_point <= 127


def dequantized() -> Iterator[tuple[nn.Module, QuantizedModel]]:
    yield build("float16")
    for symmetric, group in itertools.product((True, False), (0, 32)):
        yield build(every_layer(Scheme(3, group, "int8-dynamic", symmetric, "bfloat16")), 1)


def test_dequantize_gives_the_weights_that_both_models_multiply_with() -> None:
    for prepared, quantized in dequantized():
        for name, weight in quantized.weights.items():
            converted, trained = quantized.module.get_submodule(name).weight, prepared.get_submodule(name)
            values = converted.dequantize() if isinstance(converted, IntxUnpackedToInt8Tensor) else converted
            assert torch.equal(weight.dequantize(), values.float())
            assert torch.equal(weight.dequantize(), trained.weight_fake_quantizer(trained.weight).float())


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_scales_are_already_rounded_to_their_precision(scale_dtype: str) -> None:
    _, quantized = build(every_layer(Scheme(4, 32, scale_dtype=scale_dtype)))
    for weight in quantized.weights.values():
        assert weight.scale is not None
        assert weight.scale.dtype == torch.float32
        assert torch.equal(weight.scale.to(getattr(torch, scale_dtype)).float(), weight.scale)


def test_shapes_and_dtypes_of_a_quantized_weight() -> None:
    _, quantized = build(every_layer(Scheme(4, 32, symmetric=False)))
    weight = quantized.weights["up"]
    assert (weight.data.dtype, weight.data.shape) == (torch.int8, (96, WIDTH))
    assert weight.zero_point is not None
    assert weight.scale is not None
    assert (weight.zero_point.dtype, weight.zero_point.shape, weight.scale.shape) == (
        torch.int8,
        (96, 2),
        (96, 2),
    )
    _, symmetric = build(every_layer(Scheme(4, 32)))
    assert symmetric.weights["up"].zero_point is None


def test_bytes_are_packed_by_hand() -> None:
    _, quantized = build(every_layer(Scheme(3, 32, symmetric=False, scale_dtype="float16")), tie=True)
    table = (VOCABULARY * WIDTH * 3 + VOCABULARY * 2 * (16 + 3) + 7) // 8
    square = (96 * WIDTH * 3 + 96 * 2 * (16 + 3) + 7) // 8
    down = (96 * WIDTH * 3 + WIDTH * 3 * (16 + 3) + 7) // 8
    floats = 4 * (96 + WIDTH + WIDTH)  # the bias of up, weight and bias of the norm
    assert quantized.bytes == table + square + down + floats
    assert packed_bytes(quantized.weights["down"]) == down


def test_bytes_of_float16_are_half_and_buffers_count() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    model.register_buffer("table", torch.zeros(5))
    assert float_bytes(model) == 4 * (32 + 4 + 5)
    plan = prepare(model, "float16")
    assert ENGINE.convert(model, plan).bytes == 2 * 32 + 4 * (4 + 5)


def test_shared_parameters_count_once_in_float() -> None:
    assert float_bytes(Net()) - float_bytes(Net(tie=True)) == 4 * VOCABULARY * WIDTH


def test_a_copy_computes_the_same_and_is_independent() -> None:
    _, quantized = build("int8-dynamic-int4-weight", tie=True)
    copied = copy.deepcopy(quantized)
    assert torch.equal(copied.module(ids()), quantized.module(ids()))
    assert copied.bytes == quantized.bytes
    copied.weights["up"].data.zero_()
    assert bool(quantized.weights["up"].data.any())


def test_a_trained_model_can_be_copied() -> None:
    model = Net()
    prepare(model, "int8-dynamic-int4-weight")
    model(ids()).sum().backward()
    assert torch.equal(copy.deepcopy(model)(ids()), model(ids()))
