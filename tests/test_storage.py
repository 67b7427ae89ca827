"""Saved and loaded: the same integers, the same outputs, in another process too."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qaware
from qaware import QawareError, Scheme, load_quantized
from qaware.engines.base import QuantizedModel


class Net(nn.Module):
    """Tied modules, a norm, a persistent buffer, a cache, and an encoder layer with a fused path."""

    def __init__(self, width: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.up = nn.Linear(width, 64, bias=bias)
        self.norm = nn.LayerNorm(64)
        self.down = nn.Linear(64, width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight
        self.second_norm = nn.LayerNorm(64)
        self.second_norm.weight = self.norm.weight
        self.register_buffer("offset", torch.randn(width))
        self.register_buffer("positions", torch.randn(1, 7, width), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions + self.offset
        x = self.encoder(x + self.down(self.second_norm(self.norm(self.up(x)))))
        return self.head(x)


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def ids() -> Tensor:
    return torch.randint(0, 16, (3, 7), generator=torch.Generator().manual_seed(0))


def mixed(group: int = 0) -> dict[str, Any]:
    """Every kind of layer that there is."""
    static = {"bits": 8, "activation": "int8-static", "observer": "histogram"}
    dynamic = {"bits": 4, "group_size": 16, "activation": "int8-dynamic", "scale_dtype": "bfloat16"}
    return {
        "name": "mixed",
        "rules": [
            {"name": "up", "scheme": static},
            {"name": "down", "scheme": {"bits": 3, "group_size": 32, "symmetric": False}},
            {"name": "encoder.linear*", "scheme": dynamic},
            {"type": "Embedding", "scheme": {"bits": 16}},
            {"name": "head", "scheme": {"bits": 5}},
        ],
    }


def quantized(recipe: Any = None, dtype: torch.dtype = torch.float32) -> QuantizedModel:
    return qaware.quantize(net().to(dtype), recipe or mixed(), [ids(), ids().flip(0)])


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(ids())


def assert_equal(first: QuantizedModel, second: QuantizedModel) -> None:
    assert torch.equal(outputs(first.module), outputs(second.module))
    assert first.plan == second.plan
    assert first.plan.recipe.hash == second.plan.recipe.hash
    assert first.activations == second.activations
    assert first.weights.keys() == second.weights.keys()
    for name, weight in first.weights.items():
        other = second.weights[name]
        assert weight.scheme == other.scheme
        assert torch.equal(weight.data, other.data)
        assert torch.equal(weight.dequantize(), other.dequantize())
    assert first.bytes == second.bytes
    assert not second.module.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [None, *qaware.recipe_names()])
def test_what_is_loaded_computes_exactly_what_was_saved(
    recipe: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = quantized(recipe, dtype)
    saved.save(tmp_path / "model.pt")
    model = net(seed=1).train()
    before = copy.deepcopy(model.state_dict())
    loaded = load_quantized(tmp_path / "model.pt", model)
    assert_equal(saved, loaded)
    assert outputs(loaded.module).dtype == dtype
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model.up) is nn.Linear


def test_it_can_be_saved_again_and_built_on_the_meta_device(tmp_path: Path) -> None:
    saved = quantized()
    saved.save(tmp_path / "first.pt")
    with torch.device("meta"):
        model = Net()
    again = load_quantized(tmp_path / "first.pt", model)
    again.save(str(tmp_path / "folder" / "second.pt"))
    assert_equal(saved, load_quantized(tmp_path / "folder" / "second.pt", net(2)))


def test_ties_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    saved = quantized("int8-weight-only")
    saved.save(tmp_path / "model.pt")
    loaded = load_quantized(tmp_path / "model.pt", net(1))
    assert loaded.weights["embed"].data.data_ptr() == loaded.weights["head"].data.data_ptr()
    assert loaded.module.norm.weight is loaded.module.second_norm.weight
    data = torch.load(tmp_path / "model.pt", weights_only=True)
    assert data["layers"]["embed"]["data"] is data["layers"]["head"]["data"]


def test_a_shared_module_and_a_lone_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    for model in (nn.Sequential(layer, nn.ReLU(), layer), nn.Linear(8, 3)):
        saved = qaware.quantize(model, "int8-static", [torch.randn(4, 8)])
        saved.save(tmp_path / "model.pt")
        loaded = load_quantized(tmp_path / "model.pt", model)
        x = torch.randn(4, 8)
        assert torch.equal(loaded.module(x), saved.module(x))


def test_buffers_outside_checkpoints_are_kept_and_may_come_later(tmp_path: Path) -> None:
    class Lazy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "mask"):
                self.register_buffer("mask", torch.ones(8), persistent=False)
            return super().forward(x * self.mask)

    saved = qaware.quantize(Lazy(nn.Linear(8, 8)), "int8-static", [torch.randn(4, 8)])
    assert hasattr(saved.module, "mask")
    saved.save(tmp_path / "model.pt")
    x = torch.randn(4, 8)
    loaded = load_quantized(tmp_path / "model.pt", Lazy(nn.Linear(8, 8)))
    assert torch.equal(loaded.module(x), saved.module(x))


SCRIPT = """
import sys, torch
sys.modules["torchao"] = None
data = torch.load(sys.argv[1], weights_only=True)
up = data["layers"]["up"]
assert up["data"].dtype == torch.int8 and up["zero_point"] is None
weight = up["data"].float() * up["scale"]
del sys.modules["torchao"]
sys.path.insert(0, sys.argv[2])
from test_storage import Net, ids, outputs
from qaware import load_quantized
loaded = load_quantized(sys.argv[1], Net())
assert torch.equal(loaded.weights["up"].dequantize(), weight)
torch.save(outputs(loaded.module), sys.argv[1] + ".out")
"""


def test_a_new_process_reads_it_even_without_torchao(tmp_path: Path) -> None:
    saved = quantized()
    path = tmp_path / "model.pt"
    saved.save(path)
    command = [sys.executable, "-c", SCRIPT, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(f"{path}.out"), outputs(saved.module))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Net(width=64), "up (Linear) is (64, 64), in the file (64, 32); "),
        (lambda: Net(bias=False), "up.bias is missing"),
        (
            lambda: nn.Linear(32, 16),
            "Linear is another architecture: embed (Embedding) is missing; up (Linear) is missing; ",
        ),
        (lambda: nn.Sequential(Net()), "give the float model that was quantized, e.g. its submodule '0'"),
        (lambda: quantized().module, "up (Linear) is missing; "),
        (lambda: qaware_prepared(), "up (Linear) is missing; "),
    ],
)
def test_another_architecture_is_refused_by_name(model: Any, words: str, tmp_path: Path) -> None:
    quantized().save(tmp_path / "model.pt")
    with pytest.raises(QawareError) as caught:
        load_quantized(tmp_path / "model.pt", model())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def qaware_prepared() -> nn.Module:
    from qaware.engines.modules import ModulesEngine

    model = net()
    return ModulesEngine().prepare(model, qaware.Recipe.from_dict(mixed()).match(model))


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    quantized().save(tmp_path / "model.pt")
    model = net()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(QawareError, match=r"extra\.weight is not in the file; extra\.bias is not"):
        load_quantized(tmp_path / "model.pt", model)


def test_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(QawareError, match=r"absent\.pt: cannot be read \(No such file"):
        load_quantized(tmp_path / "absent.pt", net())
    with pytest.raises(QawareError, match="cannot be read"):
        load_quantized(tmp_path, net())
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(QawareError, match=r"text\.pt: is damaged, or not written by"):
        load_quantized(tmp_path / "text.pt", net())
    (tmp_path / "empty.pt").touch()
    with pytest.raises(QawareError, match=r"empty\.pt: is damaged"):
        load_quantized(tmp_path / "empty.pt", net())
    for other in (net().state_dict(), [1, 2], net()):
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(QawareError, match=r"other\.pt: (was not|is damaged, or not) written by"):
            load_quantized(tmp_path / "other.pt", net())


def test_a_cut_file_is_damaged(tmp_path: Path) -> None:
    quantized().save(tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(QawareError, match=r"cut\.pt: is damaged"):
            load_quantized(tmp_path / "cut.pt", net())


def test_a_newer_file_says_so(tmp_path: Path) -> None:
    quantized().save(tmp_path / "model.pt")
    data = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save({**data, "version": 99}, tmp_path / "newer.pt")
    with pytest.raises(QawareError, match="format version 99, this qaware reads up to 1; update qaware"):
        load_quantized(tmp_path / "newer.pt", net())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = quantized()
    saved.save(tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def full(data: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(QawareError, match=r"model\.pt: cannot be written \(No space left"):
        saved.save(tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_the_file_is_about_as_large_as_its_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = qaware.quantize(nn.Linear(512, 512), "int8-weight-only")
    saved.save(tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 512 * 512 + 8192
    assert Scheme(8) == saved.weights[""].scheme
