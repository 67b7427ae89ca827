"""Integer networks on the three runtimes: the same integers, and kernels that multiply integers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import qaware
from qaware.engines.base import QuantizedModel
from qaware.engines.static_integer import IntegerLayer
from qaware.errors import QawareError
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Runner
from qaware.exporters.check import check
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import compare
from qaware.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from static_net import SIGNATURE, StaticNet, images, static_net, steps

RUNTIMES = ("executorch", "aoti", "tract")
LAYERS = 6


class Made(NamedTuple):
    quantized: QuantizedModel
    artifact: Artifact
    run: Runner


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """One file for each runtime and granularity."""
    folder = tmp_path_factory.mktemp("static")
    cache: dict[tuple[str, bool], Made] = {}

    def get(runtime: str, per_tensor: bool = False) -> Made:
        exporter = get_exporter(runtime)
        if exporter.missing():
            pytest.skip(str(exporter.missing()))
        if (runtime, per_tensor) not in cache:
            quantized = static_net(per_tensor, bits=8)
            path = folder / f"{per_tensor}{exporter.suffix}"
            artifact = exporter.export(quantized, (images(1),), SIGNATURE, path)
            cache[runtime, per_tensor] = Made(quantized, artifact, exporter.open(path, SIGNATURE))
        return cache[runtime, per_tensor]

    return get


CASES = [("executorch", False), ("aoti", False), ("tract", False), ("tract", True)]


@pytest.mark.parametrize(("runtime", "per_tensor"), CASES)
def test_every_batch_size_gives_the_integers_of_the_converted_model(
    exported: Callable[..., Made], runtime: str, per_tensor: bool
) -> None:
    made = exported(runtime, per_tensor)
    largest, share = steps(made.run, made.quantized)
    assert largest <= 1  # a float32 product on the edge between two integers
    assert share < 0.01
    assert get_exporter(runtime).tolerance_for(made.quantized.plan).steps == 1


def test_a_wrong_scale_is_more_than_a_step(exported: Callable[..., Made]) -> None:
    made = exported("tract")
    wrong = copy.deepcopy(made.quantized)
    wrong.module.fc.weight_scale *= 1.5
    assert steps(made.run, wrong)[0] > 1


def test_xnnpack_takes_all_layers(exported: Callable[..., Made]) -> None:
    artifact = Artifact.open(exported("executorch").artifact.path)
    found = artifact.details["delegation"]
    assert found["int8_layers"] == found["layers"] == LAYERS
    assert found["int8_weights"] == found["weights"]
    assert {"convolution": 5, "linear": 1, "add": 1, "cat": 1, "max_pool2d": 1}.items() <= found[
        "delegated"
    ].items()
    assert set(found["portable"]) <= {"view_copy"}
    assert artifact.notes[0].startswith(f"XNNPACK runs {LAYERS} of {LAYERS} layers in int8, 100.0% of the")


def test_onednn_takes_all_layers(exported: Callable[..., Made]) -> None:
    artifact = Artifact.open(exported("aoti").artifact.path)
    assert artifact.details["kernels"]["int8"] == {"qconv": 5, "qlinear": 1}
    assert artifact.details["kernels"]["floating"] == {}
    assert artifact.notes[0].startswith(
        f"int8 kernels of onednn compute {LAYERS} of {LAYERS} layers with static"
    )
    assert not any("expanded" in note for note in artifact.notes)


def test_tract_multiplies_integers_where_a_weight_has_one_scale(exported: Callable[..., Made]) -> None:
    artifact = Artifact.open(exported("tract", True).artifact.path)
    assert set(artifact.details["products"]) == {"I32"}
    assert artifact.details["products"]["I32"] >= LAYERS
    assert artifact.notes[0].endswith("floats in 0")
    assert not any("float" in note for note in artifact.notes[1:])


def test_tract_multiplies_convolutions_of_many_scales_as_floats(exported: Callable[..., Made]) -> None:
    artifact = Artifact.open(exported("tract").artifact.path)
    assert artifact.details["products"] == {"I32": 1, "F32": 5}
    assert artifact.notes[1].startswith("the same integers are floats in 5 convolutions: their")
    assert artifact.bytes < exported("tract", True).artifact.bytes + 4096, "weights are stored as integers"


def test_tract_multiplies_integers_on_request(tmp_path: Path) -> None:
    if get_exporter("tract").missing():
        pytest.skip(str(get_exporter("tract").missing()))
    exporter, quantized = get_exporter({"tract": {"convolutions": "integer"}}), static_net()
    path = tmp_path / "integer.nnef.tgz"
    artifact = exporter.export(quantized, (images(1),), SIGNATURE, path)
    assert set(artifact.details["products"]) == {"I32"}
    assert steps(exporter.open(path, SIGNATURE), quantized)[0] <= 1


def test_tract_is_compared_with_the_converted_model_itself(exported: Callable[..., Made]) -> None:
    made = exported("tract")
    reference = get_exporter("tract").reference(made.quantized)
    assert torch.equal(reference(images(3)), made.quantized.module(images(3)))
    assert sum(isinstance(m, IntegerLayer) for m in reference.modules()) == LAYERS


def test_static_layers_leave_inductor_as_it_was(exported: Callable[..., Made]) -> None:
    from torch._inductor import config, constant_folding

    exported("aoti")
    assert config.pre_grad_custom_pass is None
    assert constant_folding._dont_constant_fold == []
    assert config.freezing is False


@pytest.mark.parametrize(
    ("runtime", "scheme", "why", "nearest"),
    [
        ("executorch", {"bits": 8}, "weight-only int8 convolutions lose", "int8 channel + int8-static"),
        ("executorch", {"bits": 8, "activation": "int8-static", "symmetric": False}, "zero points", "static"),
        ("executorch", {"bits": 8, "activation": "int8-static", "group_size": 9}, "no groups", "static"),
        ("aoti", {"bits": 8, "activation": "int8-static", "symmetric": False}, "zero points", "static"),
        ("aoti", {"bits": 8, "activation": "int8-static", "group_size": 9}, "no groups", "static"),
        ("tract", {"bits": 8, "activation": "int8-static", "symmetric": False}, "zero points", "static"),
        ("tract", {"bits": 8, "activation": "int8-dynamic"}, "which a convolution has not", "static"),
        ("aoti", {"bits": 16}, "bits: 16 is for Linear and Embedding", "int8"),
    ],
)
def test_refuses_what_would_be_wrong(runtime: str, scheme: dict, why: str, nearest: str) -> None:
    plan = Recipe.load({"rules": [{"name": "block.first", "scheme": scheme}]}).match(StaticNet())
    (problem,) = check(plan, [get_exporter(runtime)])
    assert why in problem.message
    assert problem.nearest is not None
    assert nearest in problem.nearest.label


def test_the_nearest_scheme_keeps_observer_and_granularity() -> None:
    scheme = {
        "bits": 8,
        "activation": "int8-static",
        "symmetric": False,
        "per_tensor": True,
        "observer": "mse",
    }
    plan = Recipe.load({"rules": [{"name": "stem", "scheme": scheme}]}).match(StaticNet())
    (problem,) = check(plan, [get_exporter("aoti")])
    assert problem.nearest is not None
    assert problem.nearest.to_dict() == {k: v for k, v in scheme.items() if k != "symmetric"}


def test_a_layer_of_the_modules_engine_is_refused_by_name(tmp_path: Path) -> None:
    from tiny import SIGNATURE as LM
    from tiny import quantize, tokens

    exporter = get_exporter("executorch")
    if exporter.missing():
        pytest.skip(str(exporter.missing()))
    recipe = {"rules": [{"name": "attn_out", "scheme": {"bits": 8, "activation": "int8-static"}}]}
    with pytest.raises(QawareError, match="attn_out: XNNPACK's int8 layers need an integer output"):
        exporter.export(quantize(recipe), (tokens(3),), LM, tmp_path / "m.pte")


def test_padding_that_kernels_do_not_know_is_done_before_them(tmp_path: Path) -> None:
    """Reflection in float, then an integer product, where tract has one; else a float product, listed."""
    exporter = get_exporter("tract")
    if exporter.missing():
        pytest.skip(str(exporter.missing()))
    quantized = static_net()
    stem: nn.Conv2d = quantized.module.stem
    stem.padding_mode = "reflect"
    path = tmp_path / "reflect.nnef.tgz"
    artifact = exporter.export(quantized, (images(1),), SIGNATURE, path)
    assert "stem is multiplied in float: its padding_mode is 'reflect'" in artifact.notes
    assert artifact.details["products"]["F32"] == 5
    assert steps(exporter.open(path, SIGNATURE), quantized)[0] <= 1


class Mixed(nn.Module):
    """One input channel, which onednn gets wrong by itself, then layers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.wide = nn.Conv2d(8, 32, 2)
        self.head = nn.Linear(32, 256)
        self.last = nn.Linear(256, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.wide(torch.relu(self.conv(x))))
        return self.last(torch.relu(self.head(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def mixed() -> QuantizedModel:
    """Static, weight-only and dynamic layers in one model."""
    from qaware.engines.eager import EagerEngine
    from qaware.engines.example import Example
    from qaware.observers import observers

    torch.manual_seed(0)
    int4 = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
    rules = [
        {"name": "conv", "scheme": {"bits": 8, "activation": "int8-static"}},
        {"name": "wide", "scheme": int4},
        {"name": "head", "scheme": int4},
        {"name": "last", "scheme": {"bits": 8, "activation": "int8-static"}},
    ]
    model, engine = Mixed().eval(), EagerEngine()
    plan = engine.lay_out(model, Recipe.load({"rules": rules}).match(model), Example((digits(4),)))
    engine.prepare(model, plan)
    for observing in (True, False):
        for observer in observers(model):
            observer.observing = observing
        model(digits(4))
    return engine.convert(model, plan)


def digits(batch: int) -> torch.Tensor:
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("runtime", ["aoti", "tract"])
def test_layers_of_other_kinds_keep_their_integers(
    mixed: QuantizedModel, runtime: str, tmp_path: Path
) -> None:
    exporter = get_exporter(runtime)
    if exporter.missing():
        pytest.skip(str(exporter.missing()))
    signature = Signature((TensorSpec("x", "float32", ("n", 1, 8, 8)),), {"n": (1, 8)})
    path = tmp_path / f"mixed{exporter.suffix}"
    artifact = exporter.export(mixed, (digits(2),), signature, path)
    run = exporter.open(path, signature)
    for batch in (1, 3, 8):
        difference = (run(digits(batch)) - mixed.module(digits(batch))).abs()
        assert float(difference.max()) <= 1.01 * mixed.outputs["last"].scale
    if runtime == "aoti":
        found = artifact.details["kernels"]
        assert found["int8"] == {"qconv": 1, "qlinear": 1}
        # Half a byte for each weight of the others, whose floats would be 36,864 bytes.
        assert found["constants"]["uint8"] >= mixed.weights["head"].data.numel() / 2
        assert found["constants"]["float32"] < 4096
    else:
        assert artifact.details["products"] == {"I32": 1, "F32": 3}


def test_a_largest_batch_of_16_stays_dynamic(tmp_path: Path) -> None:
    """torch guards convolutions by whether their batch is below 16."""
    exporter = get_exporter("executorch")
    if exporter.missing():
        pytest.skip(str(exporter.missing()))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)).eval()
    scheme = {"bits": 8, "activation": "int8-dynamic"}
    quantized = qaware.quantize(model, {"rules": [{"type": "Linear", "scheme": scheme}]})
    signature = Signature(SIGNATURE.inputs, {"batch": (1, 16)})
    path = tmp_path / "sixteen.pte"
    exporter.export(quantized, (images(2),), signature, path)
    inputs = [(images(batch),) for batch in (1, 5, 16)]
    parity = compare(exporter.open(path, signature), quantized.module, inputs)
    parity.require("sixteen.pte", exporter.tolerance_for(quantized.plan))


@pytest.mark.parametrize("runtime", ["executorch", "aoti"])
def test_graphs_are_exported_too(runtime: str, tmp_path: Path) -> None:
    """What ``qaware.quantize`` makes for one of these runtimes alone."""
    exporter = get_exporter(runtime)
    if exporter.missing():
        pytest.skip(str(exporter.missing()))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(8 * 16 * 16, 10))
    quantized = qaware.quantize(model.eval(), "int8-static", [images(2)] * 4, runtimes=[runtime])
    assert quantized.plan.layout is not None
    assert quantized.plan.layout.engine == "graph"
    artifact = exporter.export(quantized, (images(2),), SIGNATURE, tmp_path / f"graph{exporter.suffix}")
    reference = SIGNATURE.wrap(exporter.reference(quantized)).eval()
    inputs = [(images(1),), (images(3, 1),)]
    run = exporter.open(artifact.path, SIGNATURE)
    parity = compare(run, reference, inputs, quantized.outputs.values())
    parity.require(runtime, exporter.tolerance_for(quantized.plan))
    found = artifact.details["kernels"]["int8"] if runtime == "aoti" else None
    assert sum(found.values()) == 2 if found else artifact.details["delegation"]["int8_layers"] == 2
