"""LoRA under the modules engine: adapters inside the rounding, and what is left after convert."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.engines.fake_quant import set_fake_quant, set_softness
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.observers import observers
from qaware.plan import Plan
from qaware.recipe import Recipe, Rule
from qaware.scheme import ACTIVATIONS, Scheme

peft = pytest.importorskip("peft")

ENGINE = ModulesEngine()
WIDTH = 32
INT4 = Scheme(4, 16, "int8-dynamic")


class Net(nn.Module):
    """A layer with a bias, one without, and a head; ``tie`` shares the head with the embedding."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 12, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 12, (2, 7), generator=torch.Generator().manual_seed(seed))


def adapted(*targets: str, seed: int = 0, net: nn.Module | None = None, **options: Any) -> Any:
    """A model under peft whose adapters are as large as its weights (they start at zero otherwise)."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=list(targets or ("up", "down")), **options)
    model = peft.get_peft_model(net or Net(), config).eval()
    enlarge(model)
    return model


def enlarge(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.15)


def prepare(model: nn.Module, *rules: Rule) -> Plan:
    plan = Recipe("r", rules or (Rule(INT4, type="Linear"),)).match(model)
    assert ENGINE.prepare(model, plan) is model
    return plan


def convert(model: nn.Module, plan: Plan) -> QuantizedModel:
    return ENGINE.convert(copy.deepcopy(model), plan)


def run(model: nn.Module, seed: int = 1) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(ids(seed))
    return output


def assert_no_peft(model: nn.Module) -> None:
    assert not [n for n, m in model.named_modules() if "peft" in type(m).__module__ or "lora" in n]
    assert not [n for n, m in model.named_modules() if hasattr(m, "peft_config")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16])
def test_prepared_and_converted_agree_bit_for_bit(activation: str, symmetric: bool, group: int) -> None:
    for seed, bits in enumerate((2, 4, 8)):
        model = adapted(seed=seed)
        plan = prepare(model, Rule(Scheme(bits, group, activation, symmetric, "bfloat16"), type="Linear"))
        for observer in observers(model):
            observer.observing = True
        run(model, seed)
        for observer in observers(model):
            observer.observing = False
        quantized = convert(model, plan)
        assert torch.equal(run(quantized.module), run(model))
        assert_no_peft(quantized.module)


def test_the_integers_are_those_of_the_sum_in_the_grid_of_the_frozen_weight() -> None:
    model = adapted("up", use_rslora=True)
    layer = model.base_model.model.up
    frozen = layer.base_layer.weight.detach().clone()
    quantized = convert(model, prepare(model))
    blocks = frozen.view(48, -1, 16)
    # Symmetric int4: the largest magnitude of a group lands on 7.5 steps.
    scale = blocks.abs().amax(-1) / 7.5
    weight = quantized.weights["up"]
    assert weight.scale is not None
    torch.testing.assert_close(weight.scale, scale)
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (8 / 4**0.5)
    wanted = ((frozen + delta).view(48, -1, 16) / weight.scale.unsqueeze(-1)).round().clamp(-8, 7)
    assert torch.equal(weight.data, wanted.view(48, -1).to(torch.int8))
    assert not torch.equal(weight.data, (blocks / scale.unsqueeze(-1)).round().view(48, -1))
    # Beyond the base grid it is clipped, rather than the grid widened.
    assert bool((frozen + delta).abs().max() > 2 * frozen.abs().max())
    assert {int(weight.data.min()), int(weight.data.max())} == {-8, 7}


def test_off_is_the_float_model_bit_for_bit() -> None:
    model = adapted("up", "down", "head")
    expected = run(model)
    prepare(model)
    assert not torch.equal(run(model), expected)
    set_fake_quant(model, False)
    assert torch.equal(run(model), expected)
    # Merged is the same up to the order of float sums.
    merged = copy.deepcopy(adapted("up", "down", "head").merge_and_unload())
    torch.testing.assert_close(run(merged), expected, rtol=1e-4, atol=1e-4)


def test_gradients_pass_straight_through_to_the_adapters_alone() -> None:
    model = adapted("up")
    layer = model.base_model.model.up
    prepare(model, Rule(Scheme(4), type="Linear"))
    x = torch.randn(5, WIDTH)
    layer(x).square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        total = layer.weight + layer.delta()
        rounded = layer.base_layer.weight_fake_quantizer(total, grid=layer.weight).requires_grad_()
        steps = (total / layer.base_layer.weight_fake_quantizer.scale).round()
    F.linear(x, rounded, layer.bias).square().sum().backward()
    passed = rounded.grad * ((steps >= -8) & (steps <= 7)) * layer.scaling["default"]
    assert 0.1 < float((passed == 0).float().mean()) < 0.9
    torch.testing.assert_close(a.grad, b.T @ passed)
    torch.testing.assert_close(b.grad, passed @ a.T)
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"base_model.model.up.lora_{side}.default.weight" for side in "AB"}


def test_identity_names_hooks_and_keys_survive_prepare() -> None:
    model = adapted("up", "head")
    calls: list[str] = []
    layer = model.base_model.model.up
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    layer.base_layer.register_forward_hook(lambda *_: calls.append("base"))
    modules = {n: id(m) for n, m in model.named_modules()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    keys, adapter_keys = list(model.state_dict()), list(peft.get_peft_model_state_dict(model))
    prepare(model)
    run(model)
    assert calls == ["base", "layer"]
    assert {n: id(m) for n, m in model.named_modules() if "fake_quantizer" not in n} == modules
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert [k for k in model.state_dict() if "fake_quantizer" not in k] == keys
    assert list(peft.get_peft_model_state_dict(model)) == adapter_keys
    assert isinstance(layer, peft.tuners.lora.Linear)


def test_names_of_the_converted_model_are_those_without_adapters() -> None:
    rules = (Rule(None, name="head"), Rule(INT4, type="Linear"), Rule(Scheme(8), role="embedding"))
    plain = Net()
    expected = prepare(plain, *rules)
    model = nn.ModuleDict({"net": adapted("up", "head")})
    quantized = convert(model, prepare(model, *(Rule(None, name="net.head"), *rules[1:])))
    assert type(quantized.module["net"]) is Net
    assert [f"net.{d.parameter}" for d in expected.decisions] == [
        d.parameter for d in quantized.plan.decisions
    ]
    assert list(quantized.weights) == list(quantized.plan.quantized) == ["net.embed", "net.up", "net.down"]
    for name in quantized.weights:
        assert quantized.module.get_submodule(name).weight.shape == quantized.weights[name].data.shape
    assert quantized.plan.summary().replace("net.", "") == expected.summary()


def test_static_ranges_are_found_by_the_new_names() -> None:
    model = adapted("up")
    plan = prepare(model, Rule(Scheme(8, activation="int8-static"), type="Linear"))
    for observer in observers(model):
        observer.observing = True
    run(model)
    assert list(convert(model, plan).activations) == ["up", "down", "head"]


def test_a_target_under_peft_becomes_its_base_model() -> None:
    model = adapted()
    quantized = convert(model, prepare(model))
    assert type(quantized.module) is Net
    assert type(model).__module__.startswith("peft.")
    assert "up.base_layer" in "".join(model.state_dict())


def test_injected_adapters_without_a_peft_model() -> None:
    torch.manual_seed(0)
    net = Net()
    net.peft_config = {}  # as transformers' add_adapter leaves it
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up", "head"]), net).eval()
    enlarge(model)
    quantized = convert(model, prepare(model, Rule(INT4, name="up")))
    assert list(quantized.weights) == ["up"]
    torch.testing.assert_close(run(quantized.module), run(model), rtol=1e-4, atol=1e-4)
    assert_no_peft(quantized.module)


def test_layers_left_float_are_merged_in_float() -> None:
    model = adapted("up", "down")
    quantized = convert(model, prepare(model, Rule(None, name="down"), Rule(INT4, type="Linear")))
    expected = adapted("up", "down").merge_and_unload().down.weight
    assert torch.equal(quantized.module.down.weight, expected)
    assert list(quantized.weights) == ["up", "head"]
    torch.testing.assert_close(run(quantized.module), run(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embedding", [None, Scheme(8)])
@pytest.mark.parametrize("head", [None, Scheme(8)])
def test_an_adapted_head_leaves_the_embedding_that_it_is_tied_to(
    head: Scheme | None, embedding: Scheme | None
) -> None:
    model = adapted("head", net=Net(tie=True))
    before = model.base_model.model.embed.weight.detach().clone()
    rules = Rule(head, name="head"), Rule(embedding, role="embedding"), Rule(INT4, type="Linear")
    quantized = convert(model, prepare(model, *rules))
    if embedding is None:
        assert torch.equal(quantized.module.embed.weight, before)
    else:
        weight = quantized.weights["embed"]
        assert bool(((weight.dequantize() - before).abs() <= weight.scale * 0.5001).all())
    torch.testing.assert_close(run(quantized.module), run(model), rtol=1e-4, atol=1e-4)


def dense(layer: Any, x: Tensor) -> Tensor:
    """The layer with the whole gradient of the sum that it rounds."""
    result: Tensor = layer.base_layer(x, layer.delta())
    return result


@pytest.mark.parametrize("size", [0.02, 1.0])  # few values clipped, and many
@pytest.mark.parametrize("scheme", [INT4, Scheme(4, 16, symmetric=False), Scheme(8), Scheme(2, 16, "none")])
def test_gradients_are_those_of_the_dense_sum(scheme: Scheme, size: float) -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up"]))
    enlarge(model)
    model.base_model.set_adapter(["default", "second"])
    prepare(model, Rule(scheme, type="Linear"))
    layer = model.base_model.model.up
    with torch.no_grad():
        for parameter in layer.lora_B.parameters():
            parameter.mul_(size)
    trained = [p for n, p in layer.named_parameters() if "lora" in n]
    found = []
    for run_layer in (layer, lambda x: dense(layer, x)):
        x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = run_layer(x)
        found.append((y, *torch.autograd.grad(y.pow(2).sum(), [x, *trained])))
    assert "Passed" in type(layer(x).grad_fn).__name__
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for ours, theirs in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_gradients_under_autocast_and_while_the_rounding_is_annealed() -> None:
    model = adapted("up")
    prepare(model)
    layer = model.base_model.model.up
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    for softness in (0.0, 0.5):
        set_softness(model, softness)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = layer(x), dense(layer, x)
        assert torch.equal(ours, theirs)
        assert "Passed" in type(ours.grad_fn).__name__
        trained = [p for n, p in layer.named_parameters() if "lora" in n]
        for a, b in zip(
            *(torch.autograd.grad(y.float().sum(), trained) for y in (ours, theirs)), strict=True
        ):
            assert a.dtype == torch.float32
            assert float((a - b).norm() / b.norm()) < 0.02


def test_a_frozen_weight_gives_no_gradient_of_its_size_to_anybody() -> None:
    model = adapted("up")
    prepare(model)
    layer = model.base_model.model.up
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, WIDTH, requires_grad=True))
    size = layer.base_layer.weight.numel()
    assert [t.numel() for t in kept if t.numel() >= size] == [size]  # what is rounded, for the gradient of x


def test_disabled_adapters_mean_the_weight_alone() -> None:
    model = adapted()
    plain = copy.deepcopy(model.base_model.model)
    plan = prepare(model)
    with model.disable_adapter():
        alone = run(model)
        quantized = convert(model, plan)
    assert not torch.equal(run(model), alone)
    assert torch.equal(run(quantized.module), alone)
    base = plain.up.base_layer
    plain.up, plain.down = base, plain.down.base_layer
    prepare(plain)
    assert torch.equal(run(plain), alone)


def test_active_adapters_sum() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up"]))
    enlarge(model)
    plan = prepare(model)
    outputs = []
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        outputs.append(run(model))
        assert torch.equal(run(convert(model, plan).module), outputs[-1])
    assert len({float(o.sum()) for o in outputs}) == 3
    layer = model.base_model.model.up
    both = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    assert torch.equal(layer.delta(), both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_base_under_float_adapters(dtype: torch.dtype) -> None:
    model = adapted(net=Net().to(dtype))
    assert model.base_model.model.up.lora_A["default"].weight.dtype == torch.float32
    plan = prepare(model)
    output = run(model)
    assert output.dtype == dtype
    assert torch.equal(run(convert(model, plan).module), output)


def test_both_agree_under_autocast() -> None:
    model = adapted()
    quantized = convert(model, prepare(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(quantized.module), run(model))


def test_float16_weights() -> None:
    model = adapted()
    quantized = convert(model, prepare(model, Rule(Scheme(16), type="Linear")))
    assert quantized.weights["up"].data.dtype == torch.float16
    assert torch.equal(run(quantized.module), run(model))


def test_a_head_that_is_trained_whole_ships_its_trained_copy() -> None:
    model = adapted("up", modules_to_save=["head"])
    copies = model.base_model.model.head.modules_to_save
    nn.init.normal_(copies["default"].weight)
    quantized = convert(model, prepare(model))
    assert list(quantized.weights) == ["up", "down", "head"]
    assert torch.equal(run(quantized.module), run(model))
    assert_no_peft(quantized.module)


def test_a_base_weight_that_trains_too_takes_its_grid_along() -> None:
    model = adapted("up")
    base = model.base_model.model.up.base_layer
    base.weight.requires_grad_(True)
    plan = prepare(model)
    model(ids()).square().sum().backward()
    assert bool(base.weight.grad.any())
    before = convert(model, plan)
    with torch.no_grad():
        base.weight.mul_(2)
    after = convert(model, plan)
    assert torch.equal(after.weights["up"].scale, 2 * before.weights["up"].scale)
    assert torch.equal(run(after.module), run(model))


def test_dropout_is_refused_before_training_and_taken_where_nothing_trains() -> None:
    model = adapted("up", lora_dropout=0.1).train()
    with pytest.raises(QawareError, match=r"up\.base_layer: lora_dropout is 0\.1, .*; set lora_dropout=0"):
        prepare(model)
    assert not [n for n, m in model.named_modules() if hasattr(m, "weight_fake_quantizer")]
    prepare(model, Rule(None, name="up"), Rule(INT4, type="Linear"))
    model = adapted("up", lora_dropout=0.1)
    plan = prepare(model)
    assert torch.equal(run(convert(model, plan).module), run(model))
    with pytest.raises(QawareError, match=r"lora_dropout is 0\.1"):
        model.train()(ids())


def test_a_prepared_layer_is_not_merged_by_peft() -> None:
    model = adapted()
    prepare(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QawareError, match=r"merge: a prepared LoRA layer is merged by qaware\.convert\(\)"):
        model.merge_and_unload()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_batch_of_mixed_adapters_is_refused() -> None:
    model = adapted("up")
    prepare(model)
    with pytest.raises(QawareError, match="adapter_names: one batch has one rounded weight"):
        model.base_model.model.up(torch.randn(2, WIDTH), adapter_names=["default", "__base__"])


def test_prepare_twice_changes_nothing() -> None:
    model = adapted()
    plan = prepare(model)
    expected, keys = run(model), list(model.state_dict())
    prepare(model)
    assert torch.equal(run(model), expected)
    assert list(model.state_dict()) == keys
    assert Recipe("r", (Rule(INT4, type="Linear"),)).match(model).quantized.keys() == plan.quantized.keys()


def test_a_tiny_llama_converts_and_exports() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=24,
        tie_word_embeddings=True,
    )
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=4, **options)).eval()
    enlarge(model)
    plan = Recipe.load("int8-dynamic-int4-weight").match(model)
    ENGINE.prepare(model, plan)
    quantized = convert(model, plan)
    tokens = ids()
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(quantized.module(input_ids=tokens, use_cache=False).logits, expected)
    assert type(quantized.module) is LlamaForCausalLM
    assert "model.layers.1.mlp.down_proj" in quantized.weights
    assert_no_peft(quantized.module)
    program = torch.export.export(quantized.module, (tokens,), {"use_cache": False})
    assert not any("lora" in name for name in program.state_dict)
    with torch.no_grad():
        assert torch.equal(program.module()(tokens, use_cache=False).logits, expected)


def test_peft_is_not_imported_for_a_model_without_it() -> None:
    code = (
        "import sys; from torch import nn; from qaware.engines.modules import ModulesEngine;"
        "from qaware.recipe import Recipe; m = nn.Sequential(nn.Linear(32, 8));"
        "p = Recipe.load('int8-dynamic').match(m); e = ModulesEngine(); e.convert(e.prepare(m, p), p);"
        "assert 'peft' not in sys.modules and 'qaware.engines.lora' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
