"""The recipes of other tools on a tiny decoder: planned as there, trained, prepared as converted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import qaware
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.recipe import Recipe
from qaware.shipped import preset_names, recipe_names

WIDTH, VOCABULARY = 256, 40
NAMES = preset_names()
JSON: dict[str, dict[str, Any]] = {
    "a8wxdq": {
        "embedding:wx": {"bitwidth": 2, "groupsize": 32},
        "linear:a8wxdq": {"bitwidth": 3, "groupsize": 128, "has_weight_zeros": True},
    },
    "afpwx": {"embedding": {"bitwidth": 8, "groupsize": 8}, "linear:afpwx": {"bitwidth": 1, "groupsize": 64}},
    "int8": {"linear:int8": {"groupsize": 16}, "precision": {"dtype": "bf16"}},
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"v_proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["up_proj"](torch.relu(self.attn["v_proj"](x)))


class Decoder(nn.Module):
    """Embedding, two layers, a layer of no role, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.mixer, self.lm_head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.mixer(self.layers(self.embed(ids))))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(seed))


def labels(name: str) -> list[str]:
    """Of the embedding, both attentions and feedforwards in turn, the mixer and the head."""
    plan = Recipe.load(name).match(Decoder())
    found = {
        d.module: d.scheme.label if d.scheme else "float" for d in plan.decisions if "weight" in d.parameter
    }
    return list(found.values())


@pytest.mark.parametrize("source", [*NAMES, *JSON])
def test_trained_prepared_and_converted_compute_the_same(source: str) -> None:
    model, recipe = Decoder(), Recipe.load(JSON.get(source, source))
    plan = recipe.match(model)
    ModulesEngine().prepare(model, plan)
    set_fake_quant(model, True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(ids()).flatten(0, 1), ids(1).flatten()).backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(ids())
        converted = ModulesEngine().convert(model, plan)
        assert torch.equal(converted.module(ids()), expected)


@pytest.mark.parametrize("source", [*NAMES, *JSON])
def test_quantized_after_training(source: str) -> None:
    model = Decoder().eval()
    quantized = qaware.quantize(model, JSON.get(source, source))
    error = (quantized.module(ids()) - model(ids())).abs().mean() / model(ids()).std()
    assert 0 < float(error) < (1 if source in JSON else 0.25)


def test_ai_edge_presets_are_what_they_are_there() -> None:
    assert labels("ai-edge-int8-dynamic") == ["int8 channel", *["int8 channel + int8-dynamic"] * 6]
    assert labels("ai-edge-int8-weight-only") == ["int8 channel"] * 7
    assert labels("ai-edge-fp16") == ["float16"] * 7
    for block in (32, 64, 128, 256):
        grid = f"int4 g{block}"
        assert labels(f"ai-edge-int4-dynamic-block{block}") == [grid, *[f"{grid} + int8-dynamic"] * 6]
    layer = ["int8 channel", "int8 channel + int8-dynamic"]
    assert labels("ai-edge-selective") == ["int8 channel", *layer, *layer, "float16", "float16"]


def test_torch_to_nnef_presets_are_what_they_are_there() -> None:
    assert labels("min_max_q4_0") == ["float", *["int4 g32"] * 6]
    for name in ("with_embeddings", "with_embeddings_99", "all"):
        assert labels(f"min_max_q4_0_{name}") == ["int4 g32"] * 7


@pytest.mark.skipif(importlib.util.find_spec("litert_torch") is None, reason="litert_torch is not installed")
def test_ai_edge_presets_beside_their_source() -> None:
    from litert_torch.generative.quantize import quant_attrs, quant_recipes

    def attributes(made: Any) -> tuple[str, str, str]:
        default = made.generative_recipe.default
        return default.weight_dtype.name, default.mode.name, default.granularity.name

    assert attributes(quant_recipes.full_dynamic_recipe()) == ("INT8", "DYNAMIC_RANGE", "CHANNELWISE")
    assert attributes(quant_recipes.full_weight_only_recipe()) == ("INT8", "WEIGHT_ONLY", "CHANNELWISE")
    assert attributes(quant_recipes.full_fp16_recipe()) == ("FP16", "WEIGHT_ONLY", "NONE")
    blocks = {g.name for g in quant_attrs.Granularity if g.name.startswith("BLOCKWISE")}
    ours = {name.rpartition("block")[2] for name in NAMES if "block" in name}
    assert blocks == {f"BLOCKWISE_{size}" for size in ours}


@pytest.mark.parametrize("name", NAMES)
def test_each_names_its_source(name: str) -> None:
    path = Path(__file__).parents[1] / "recipes" / "presets" / f"{name}.yaml"
    said = yaml.safe_load(path.read_text())["description"]
    assert any(tool in said for tool in ("torchchat", "AI Edge Torch", "torch_to_nnef"))


def test_they_are_the_files_of_their_folder_and_all_different_from_ours() -> None:
    folder = Path(__file__).parents[1] / "recipes" / "presets"
    assert sorted(p.stem for p in folder.glob("*.yaml")) == NAMES
    every = [*NAMES, *recipe_names()]
    assert len({Recipe.load(name).hash for name in every}) == len(set(every)) == len(every)


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_and_round_trips(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(QawareError, match=r"did you mean 'torchchat-mobile'\?"):
        Recipe.load("torchchat-mobil")
