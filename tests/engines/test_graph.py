"""The graph engine: what is trained is what ships, on the operators that the runtime has."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.base import float_bytes
from qaware.engines.example import Example
from qaware.engines.fake_quant import is_rounding, set_fake_quant
from qaware.engines.graph import GraphEngine, set_batch_norm_training
from qaware.engines.graph_module import program
from qaware.errors import QawareError
from qaware.layout import Layout
from qaware.observers import observers
from qaware.plan import Plan
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme

pytest.importorskip("executorch", reason="the XNNPACK quantizer is in executorch")

ENGINE = GraphEngine()
STATIC = Scheme(8, activation="int8-static")
TARGETS = ["executorch", "aoti"]


class Block(nn.Module):
    """One ReLU module that is called twice, and a residual addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(width, eps=1e-3, momentum=0.3)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.norm_two = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_two(self.two(self.relu(self.norm_one(self.one(x)))))
        return self.relu(y + x)


class Residual(nn.Module):
    """A small residual network; ``scale`` is a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.block = Block(8)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = F.adaptive_avg_pool2d(self.block(self.stem(x)), 1).flatten(1)
        y = self.dropout(y)
        if scale is not None:
            y = y * scale
        return {"logits": self.head(y)}


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.norm(self.up(x))))


def recipe(scheme: Scheme = STATIC, *types: str) -> Recipe:
    return Recipe("all", tuple(Rule(scheme, type=kind) for kind in types or ("Linear", "Conv2d")))


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def residual(seed: int = 0) -> Residual:
    """With batch norms that change something, and a channel that is switched off."""
    torch.manual_seed(seed)
    model = Residual().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    with torch.no_grad():
        model.block.norm_two.weight[2] = 0
    return model


def prepare(
    model: nn.Module, example: Example, target: str, training: bool = True, scheme: Scheme = STATIC
) -> Plan:
    plan = ENGINE.lay_out(model, recipe(scheme).match(model), example, target, training)
    assert ENGINE.prepare(model, plan) is model
    return plan


def observe(model: nn.Module, on: bool) -> None:
    for observer in observers(model):
        observer.observing = on


def train(model: nn.Module, steps: range, rounding: bool = True) -> list[float]:
    """Losses of plain steps; everything random follows from the number of the step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    model.train()
    set_fake_quant(model, rounding)
    observe(model, True)
    for step in steps:
        torch.manual_seed(step)
        loss = F.cross_entropy(model(images(8, step))["logits"], torch.randint(0, 5, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    observe(model, False)
    model.eval()
    return losses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_prepared_and_converted_agree_exactly(target: str, training: bool) -> None:
    for seed in range(2):
        model, x = residual(seed), images(seed=seed)
        plan = prepare(model, Example((x,)), target, training)
        if training:
            train(model, range(3))
        else:
            observe(model, True)
            model(x)
            observe(model, False)
        with torch.no_grad():
            prepared = model(x)["logits"]
            quantized = ENGINE.convert(copy.deepcopy(model), plan)
            assert torch.equal(quantized.module(x)["logits"], prepared)
            # Another size of the batch takes another kernel of PyTorch's, and sums in another order.
            torch.testing.assert_close(quantized.module(x[:1])["logits"], prepared[:1], rtol=0, atol=0.05)
        assert prepared.abs().max() > 0.1


@pytest.mark.parametrize("scheme", [STATIC, Scheme(8, activation="int8-dynamic")])
@pytest.mark.parametrize("target", TARGETS)
def test_linear_networks_static_and_dynamic(target: str, scheme: Scheme) -> None:
    torch.manual_seed(0)
    model, x = Perceptron().eval(), torch.randn(7, 12)
    nn.init.normal_(model.norm.running_mean)
    with torch.no_grad():
        exact = model(x)
    plan = prepare(model, Example((x,)), target, True, scheme)
    observe(model, True)
    model(x)
    observe(model, False)
    quantized = ENGINE.convert(copy.deepcopy(model), plan)
    with torch.no_grad():
        assert torch.equal(quantized.module(x), model(x))
        assert 0 < float((model(x) - exact).abs().max()) < 0.05
    assert isinstance(quantized.module.norm, nn.Identity)


def test_the_integers_are_those_of_the_folded_weight() -> None:
    model, x = residual(), images()
    plan = prepare(model, Example((x,)), "executorch")
    observe(model, True)
    model(x)
    quantized = ENGINE.convert(copy.deepcopy(model), plan)
    norm, layer = model.block.norm_one, model.block.one
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = (layer.weight * factor.view(-1, 1, 1, 1)).detach()
    weight = quantized.weights["block.one"]
    assert weight.data.shape == (8, 72)
    assert weight.scale is not None
    assert int(weight.data.min()) >= -127
    torch.testing.assert_close(weight.scale[:, 0], folded.flatten(1).abs().amax(1) / 127)
    error = (weight.dequantize() - folded.flatten(1)).abs() / weight.scale
    assert float(error.max()) <= 0.501
    assert torch.equal(quantized.module.block.one.weight.flatten(1), weight.data)


def test_a_converted_model_holds_each_weight_once_and_knows_its_ranges() -> None:
    model, x = residual(), images()
    size = float_bytes(model)
    plan = prepare(model, Example((x,)), "executorch", training=False)
    observe(model, True)
    model(x)
    quantized = ENGINE.convert(model, plan)
    layers = {"stem.0", "block.one", "block.two", "head"}
    assert quantized.weights.keys() == layers == quantized.activations.keys()
    assert quantized.outputs.keys() == {*layers, "qaware_graph.relu_0"}, "and the addition with its ReLU"
    assert quantized.outputs["stem.0"] == quantized.activations["block.one"]
    assert quantized.outputs["stem.0"].zero_point == -128, "a ReLU is fused, so its range starts at zero"
    assert quantized.activations["stem.0"].scale == pytest.approx(float(x.max() - x.min()) / 255)
    assert {key.rpartition(".")[2] for key in quantized.module.state_dict()} == {
        "weight",
        "bias",
        "weight_scale",
        "weight_zero_point",
    }
    weights = sum(weight.data.numel() for weight in quantized.weights.values())
    assert weights < quantized.bytes < size / 2


def test_a_model_that_is_not_rounding_computes_what_it_did() -> None:
    model, x = residual(), images()
    with torch.no_grad():
        exact = model(x)["logits"]
        prepare(model, Example((x,)), "executorch")
        assert is_rounding(model)
        set_fake_quant(model, False)
        assert not is_rounding(model)
        torch.testing.assert_close(model(x)["logits"], exact, rtol=1e-5, atol=1e-5)


def test_training_without_rounding_is_the_training_of_the_float_model() -> None:
    model, prepared = residual(), residual()
    prepare(prepared, Example((images(),)), "executorch")
    losses = train(prepared, range(4), rounding=False)
    torch.testing.assert_close(losses, train(model, range(4)), rtol=1e-4, atol=1e-4)
    for (name, one), (_, other) in zip(
        model.named_buffers(),
        ((n, b) for n, b in prepared.named_buffers() if "fake_quant" not in n),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=name)
    gamma = prepared.block.norm_two.weight[2]
    assert bool(gamma.isfinite()), "a channel whose gamma was 0"
    assert float(gamma) == pytest.approx(float(model.block.norm_two.weight[2]), abs=1e-4)
    assert float(gamma) != 0


def test_modes_follow_each_module() -> None:
    model, x = residual(), images()
    prepare(model, Example((x,)), "executorch")
    set_fake_quant(model, False)
    model.train()
    set_batch_norm_training(model, False)
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert not torch.equal(model(x)["logits"], model(x)["logits"]), "dropout is on"
    model.dropout.eval()
    frozen = model(x)["logits"]
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    frozen.sum().backward()
    assert model.block.norm_one.weight.grad is not None
    model.eval()
    assert torch.equal(model(x)["logits"], frozen)
    model.train()
    model(x)
    assert int(model.block.norm_one.num_batches_tracked) == 1


def test_dropout_keeps_its_probability() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.dropout = nn.Linear(4, 1000), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.layer(x))

    model = Net()
    prepare(model, Example((torch.randn(2, 4),)), "executorch")
    for _ in range(3):
        model.eval()
        model.train()
    share = float((model(torch.randn(4, 4)) == 0).float().mean())
    assert share == pytest.approx(0.1, abs=0.03)


def test_identity_and_float_checkpoints_survive_prepare() -> None:
    model, saved = residual(), residual(1).state_dict()
    modules = {name: id(m) for name, m in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    prepare(model, Example((images(),)), "executorch")
    assert isinstance(model, Residual)
    assert modules.items() <= {name: id(m) for name, m in model.named_modules()}.items()
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert [key for key in model.state_dict() if "_fake_quantizer." not in key] == keys
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert not unexpected
    assert all(".observer." in key for key in missing)
    assert torch.equal(model.block.one.weight, saved["block.one.weight"])


def again(model: nn.Module, plan: Plan) -> nn.Module:
    """As a resumed run makes it: from the class, the plan as plain data, and a checkpoint."""
    assert plan.layout is not None
    layout = Layout.from_dict(plan.layout.to_dict())
    fresh = Residual()
    ENGINE.prepare(fresh, Plan(plan.recipe, plan.decisions, layout))
    fresh.load_state_dict(model.state_dict())
    return fresh


def pickled(model: nn.Module, _: Plan) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("way", [again, pickled, lambda model, _: copy.deepcopy(model)])
@pytest.mark.parametrize("target", TARGETS)
def test_a_resumed_or_copied_model_trains_on_exactly(target: str, way: Any) -> None:
    model = residual()
    plan = prepare(model, Example((images(),)), target)
    train(model, range(3))
    other = way(model, plan)
    assert train(other, range(3, 6)) == train(model, range(3, 6))
    state = model.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_a_copy_is_independent() -> None:
    model, x = residual(), images()
    prepare(model, Example((x,)), "executorch")
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = other(x)["logits"]
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(x)["logits"], expected)
        assert not torch.equal(model(x)["logits"], expected)


def test_keyword_arguments_are_those_of_the_example() -> None:
    model, x, scale = residual(), images(), torch.rand(6, 8)
    with torch.no_grad():
        exact = model(x, scale=scale)["logits"]
        prepare(model, Example((x,), {"scale": scale}), "executorch")
        set_fake_quant(model, False)
        torch.testing.assert_close(model(scale=scale, x=x)["logits"], exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x, scale)["logits"], exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(QawareError, match=r"Residual\.forward: scale is not what the graph was made for"):
        model(x)
    other = residual()
    prepare(other, Example((x,)), "executorch")
    with pytest.raises(QawareError, match=r"scale is not .* \(the example had none\)"):
        other(x, scale=scale)


def test_a_layer_that_stays_float_and_additions_between_float_layers_are_not_rounded() -> None:
    model, x = residual(), images()
    rules = (Rule(None, name="block.*"), *recipe().rules)
    plan = ENGINE.lay_out(model, Recipe("part", rules).match(model), Example((x,)), "executorch", True)
    ENGINE.prepare(model, plan)
    assert plan.quantized.keys() == {"stem.0", "head"}
    found = {name.rpartition(".")[0] for name, m in model.named_modules() if name.endswith("_fake_quantizer")}
    assert not any(name.startswith("block") for name in found)
    assert not any("add" in name for name, _ in model.qaware_graph.named_children())
    train(model, range(2))
    quantized = ENGINE.convert(copy.deepcopy(model), plan)
    with torch.no_grad():
        assert torch.equal(quantized.module(x)["logits"], model(x)["logits"])
    assert isinstance(quantized.module.block.norm_one, nn.BatchNorm2d)


def test_a_layer_that_the_runtime_cannot_round_is_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).mean(2))

    model = Net()
    planned = recipe(STATIC, "Linear", "Conv1d").match(model)
    plan = ENGINE.lay_out(model, planned, Example((torch.randn(2, 3, 9),)), "aoti", False)
    assert plan.quantized.keys() == {"second"}
    (decision,) = [d for d in plan.skipped if d.parameter == "first.weight"]
    assert "no int8 form in a graph for aoti" in decision.reason
    plan = ENGINE.lay_out(model, planned, Example((torch.randn(2, 3, 9),)), "executorch", False)
    assert plan.quantized.keys() == {"first", "second"}


@pytest.mark.parametrize(
    ("scheme", "target", "message"),
    [
        (Scheme(4, 0, "int8-static"), "executorch", "stem.0: int4 channel .* int8 kernels only"),
        (Scheme(8), "aoti", "integer activations; use activation: int8-static"),
        (Scheme(8, activation="int8-static", symmetric=False), "executorch", "weights are symmetric"),
        (Scheme(8, activation="int8-dynamic"), "executorch", "convolutions take calibrated"),
        (Scheme(8, activation="int8-static", per_tensor=True), "aoti", "leave per_tensor out"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(scheme: Scheme, target: str, message: str) -> None:
    model = residual()
    with pytest.raises(QawareError, match=message):
        ENGINE.lay_out(model, recipe(scheme).match(model), Example((images(),)), target, True)


def test_two_schemes_an_embedding_or_another_target_are_refused() -> None:
    model, example = residual(), Example((images(),))
    rules = (Rule(STATIC, type="Conv2d"), Rule(Scheme(8, activation="int8-dynamic"), type="Linear"))
    with pytest.raises(QawareError, match=r"head: .* beside .* of stem\.0; the graph engine has one scheme"):
        ENGINE.lay_out(model, Recipe("two", rules).match(model), example, "executorch", True)
    with pytest.raises(QawareError, match="target: 'tract' has no graph engine"):
        ENGINE.lay_out(model, recipe().match(model), example, "tract", True)
    words = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    plan = recipe(STATIC, "Embedding", "Linear").match(words)
    with pytest.raises(QawareError, match=r"0: int8 channel .* embeddings stay float there"):
        ENGINE.lay_out(words, plan, Example((torch.zeros(2, 3, dtype=torch.long),)), "executorch", True)


class OnData(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return super().forward(x)
        return x


class OnMode(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return torch.tanh(y) if self.training else y


class OnBatch(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x).reshape(2, 4)


def test_control_flow_that_a_graph_cannot_have_is_refused_with_its_line() -> None:
    example = Example((torch.randn(2, 4),))
    for model, message in (
        (nn.Sequential(nn.Linear(4, 4), OnData(4, 4)), r"test_graph\.py:\d+, in forward: .*engine: eager"),
        (OnMode(nn.Linear(4, 4)), r"tanh.* runs in one of training and evaluation only .*test_graph\.py"),
        (OnBatch(nn.Linear(4, 4)), r"cannot be exported .*batch.*engine: eager"),
    ):
        with pytest.raises(QawareError, match=message):
            ENGINE.lay_out(model, recipe().match(model), example, "executorch", True)
        assert all(module.training for module in model.modules()), "the modes are put back"


def test_errors_name_what_to_do() -> None:
    model, x = residual(), images()
    planned = recipe().match(model)
    with pytest.raises(QawareError, match="call GraphEngine"):
        ENGINE.prepare(model, planned)
    with pytest.raises(QawareError, match="is not prepared"):
        ENGINE.convert(model, planned)
    with pytest.raises(QawareError, match="a list cannot enter an exported graph"):
        ENGINE.lay_out(model, planned, Example((x,), {"scale": [1.0]}), "executorch", True)
    with pytest.raises(QawareError, match="no input is a tensor with a batch axis"):
        ENGINE.lay_out(model, planned, Example(), "executorch", True)
    half = residual().bfloat16()
    with pytest.raises(QawareError, match=r"stem\.0: weight is torch\.bfloat16; .* float32"):
        ENGINE.lay_out(half, recipe().match(half), Example((x.bfloat16(),)), "executorch", True)
    plan = prepare(model, Example((x,)), "executorch")
    with pytest.raises(QawareError, match=r"stem\.0: int8-static: no finite activation was observed"):
        ENGINE.convert(copy.deepcopy(model), plan)


def test_a_converted_model_exports_again_with_any_batch() -> None:
    model, x = residual(), images()
    plan = prepare(model, Example((x,)), "executorch", training=False)
    observe(model, True)
    model(x)
    quantized = ENGINE.convert(model, plan)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(quantized.module, (x,), dynamic_shapes=({0: batch},), strict=False)
    operators = {str(node.target) for node in exported.graph.nodes}
    assert "quantized_decomposed.quantize_per_tensor.default" in operators
    assert "quantized_decomposed.dequantize_per_channel.default" in operators
    assert not any("batch_norm" in name for name in operators)
    one = images(1, 5)
    with torch.no_grad():
        assert torch.equal(exported.module()(one)["logits"], quantized.module(one)["logits"])
    with pytest.raises(QawareError, match="a converted model cannot be pickled"):
        torch.save(quantized.module, io.BytesIO())


def test_one_observer_of_a_pooled_tensor_looks_once() -> None:
    model, x = residual(), images()
    plan = prepare(model, Example((x,)), "executorch", scheme=Scheme(8, activation="int8-static"))
    seen: list[tuple[int, ...]] = []
    quantizer = model.stem[0].output_fake_quantizer
    quantizer.observer.register_forward_hook(
        lambda m, a, _: seen.append(tuple(a[0].shape)) if m.observing else None
    )
    observe(model, True)
    model(x)
    assert seen == [(6, 8, 8, 8)], "before the pooling, not after"
    assert "stem.0.output_fake_quantizer" in str(program(model).graph)
    assert plan.layout is not None


def test_a_layer_that_is_called_twice_is_rounded_at_both() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv2d(3, 3, 3, padding="same"), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(F.relu(self.layer(x))).mean((2, 3)))

    for target in TARGETS:
        model, x = Net().eval(), images()
        plan = prepare(model, Example((x,)), target, training=False)
        observe(model, True)
        model(x)
        quantized = ENGINE.convert(copy.deepcopy(model), plan)
        with torch.no_grad():
            assert torch.equal(quantized.module(x), model(x))
        assert quantized.weights.keys() == {"layer", "head"}


def test_an_encoder_layer_is_rounded_inside_and_keeps_its_dropout() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        exact = model(x)
        plan = prepare(model, Example((x,)), "executorch")
        assert plan.quantized.keys() == {"layers.0.linear1", "layers.0.linear2"}
        set_fake_quant(model, False)
        torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)
        model.train()
        assert float((model(x) - exact).abs().max()) > 0.1
    assert torch.backends.mha.get_fastpath_enabled()


def test_tensors_made_in_forward_follow_the_model_to_its_device() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.arange(3, device=x.device) + torch.tensor([1.0, 2.0, 3.0]).to(x)

    model, x = Net(), torch.randn(2, 4)
    exact = model(x)
    prepare(model, Example((x,)), "executorch")
    set_fake_quant(model, False)
    torch.testing.assert_close(model(x), exact)
    model.to("meta")
    assert model(x.to("meta")).device.type == "meta"


def test_preparing_draws_no_random_numbers() -> None:
    model = residual()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    prepare(model, Example((images(),)), "aoti")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_a_converted_model_is_rebuilt_from_what_was_kept(target: str) -> None:
    model, x = residual(), images()
    plan = prepare(model, Example((x,)), target)
    assert plan.layout is not None
    norms = {site.module: site.batch_norm for site in plan.layout.layers}
    assert norms == {
        "stem.0": "stem.1",
        "block.one": "block.norm_one",
        "block.two": "block.norm_two",
        "head": None,
    }
    train(model, range(2))
    kept = ENGINE.convert(copy.deepcopy(model), plan)
    fresh = Residual()
    for name, norm in norms.items():
        fresh.get_submodule(name).bias = nn.Parameter(kept.module.get_submodule(name).bias.clone())
        if norm is not None:
            prefix, _, key = norm.rpartition(".")
            setattr(fresh.get_submodule(prefix), key, nn.Identity())
    rebuilt = ENGINE.rebuild(fresh, plan, kept.weights, kept.activations, kept.outputs)
    with torch.no_grad():
        assert torch.equal(rebuilt.module(x)["logits"], kept.module(x)["logits"])
    assert rebuilt.outputs == kept.outputs
    assert rebuilt.bytes == kept.bytes
