"""FSDP2 in a group of one process; tests/acceptance trains with two."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from qaware import Recipe
from qaware.engines.modules import ModulesEngine
from qaware.sharded import copyable, is_sharded, plain_class, set_class


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def sharded(mesh: DeviceMesh) -> nn.Sequential:
    model = net()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def test_the_class_under_fsdp(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    assert [is_sharded(m) for m in model] == [True, False, False]
    assert [plain_class(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_sharded_layer_changes_its_class_and_stays_sharded(mesh: DeviceMesh) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, plain = sharded(mesh), net()
    set_class(model[0], Doubled)
    assert plain_class(model[0]) is Doubled
    assert isinstance(model[0], FSDPModule)
    x = torch.randn(3, 8)
    assert torch.equal(model[0](x), 2 * plain[0](x))
    with pytest.raises(AssertionError, match="does not support deepcopy"):
        copy.deepcopy(model[0])


def test_a_recipe_matches_and_prepares_sharded_layers(mesh: DeviceMesh) -> None:
    model, plain = sharded(mesh), net()
    recipe = Recipe.load("int8-dynamic")
    assert recipe.match(model).quantized.keys() == {"0", "2"}
    for each in (model, plain):
        ModulesEngine().prepare(each, recipe.match(each))
    x = torch.randn(3, 8)
    assert torch.equal(model(x), plain(x))


def test_a_copy_is_plain_and_the_original_stays_sharded(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    seen: list[str] = []
    model[2].register_forward_hook(lambda *_: seen.append("hook"))
    x = torch.randn(3, 8)
    expected = model(x)
    with copyable(model) as memo:
        duplicate = copy.deepcopy(model, memo)
    assert [type(m) for m in duplicate.modules()] == [nn.Sequential, nn.Linear, nn.ReLU, nn.Linear]
    assert all(type(p) is nn.Parameter for p in duplicate.parameters())
    assert torch.equal(duplicate(x), expected)
    assert seen == ["hook", "hook"], "the user's own hooks are copied"
    assert is_sharded(model[0])
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_plain_model_needs_nothing() -> None:
    with copyable(net()) as memo:
        assert memo == {}


def test_the_original_is_whole_again_after_an_error(mesh: DeviceMesh, tmp_path: Path) -> None:
    model = sharded(mesh)
    with pytest.raises(ValueError, match="on purpose"), copyable(model):
        raise ValueError("on purpose")
    assert is_sharded(model[0])
    assert model(torch.randn(3, 8)).shape == (3, 4)
