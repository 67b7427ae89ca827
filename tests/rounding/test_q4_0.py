"""Q4_0 as torch_to_nnef rounds it: by hand, and against its own functions where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from rounded import VOCABULARY, grid, ids, net, recipe, weights
from torch import Tensor, nn

import qaware
from qaware.errors import QawareError
from qaware.recipe import Recipe, Rule
from qaware.rounding.q4_0 import choose
from qaware.roundings import Q40

Q4_0 = {"bits": 4, "group_size": 32, "scale_dtype": "float16"}
INSTALLED = importlib.util.find_spec("torch_to_nnef") is not None


class Convolutions(nn.Module):
    """An embedding, both kinds of convolution, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.conv1, self.conv2 = nn.Conv1d(32, 16, 3, padding=1), nn.Conv2d(16, 8, (1, 4))
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.conv1(self.embed(tokens).transpose(1, 2)))
        x = self.conv2(x.unsqueeze(2)).mean((2, 3))
        return self.down(torch.relu(self.up(x)))


def theirs(weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Integers -8 to 7 (rows, width) and scales (rows, width / 32)."""
    from torch_to_nnef.tensor.quant import fp_to_tract_q4_0_with_min_max_calibration

    made = fp_to_tract_q4_0_with_min_max_calibration(weight.detach(), percentile=share)
    integers = made.decompress_to_u8().to(torch.int8).flatten(1) - 8
    return integers, made.qscheme.scale.float().reshape(len(weight), -1)


def test_by_hand() -> None:
    weight = torch.zeros(1, 32)
    # The largest is on -8 by a scale below zero; 0.25 and -0.25 are halfway between two, and go up.
    weight[0, :5] = torch.tensor([4.0, -4.0, 0.25, -0.25, 1.1])
    chosen = choose(weight, grid(**Q4_0), Q40(), None)
    assert chosen.scale.tolist() == [[-0.5]]
    assert (chosen.weight / chosen.scale)[0, :5].tolist() == [-8, 7, 0, 1, -2]
    assert chosen.zero_point.tolist() == [[0]]


def test_zeros_and_what_float16_has_no_reciprocal_for() -> None:
    weight = torch.zeros(2, 32)
    weight[1] = 1e-7
    chosen = choose(weight, grid(**Q4_0), Q40(), None)
    assert not chosen.weight.any()
    assert bool((chosen.scale.abs() == 2.0**-15).all())


@pytest.mark.skipif(not INSTALLED, reason="torch_to_nnef is not installed")
@pytest.mark.parametrize("share", [1.0, 0.99, 0.9])
def test_integers_and_scales_are_those_of_torch_to_nnef(share: float) -> None:
    for seed in range(20):
        weight = weights(64, 128, seed) * 10.0 ** (seed % 5 - 3)
        weight[:, ::3] = (weight[:, ::3] * 16).round() / 16  # on and between levels
        chosen = choose(weight, grid(**Q4_0), Q40(share), None)
        integers, scale = theirs(weight, share)
        used = integers.reshape(*scale.shape, -1).any(-1)
        assert torch.equal(chosen.scale[used], scale[used])
        found = (chosen.weight.reshape(*scale.shape, -1) / chosen.scale.unsqueeze(-1)).round()
        assert torch.equal(found.flatten(1).to(torch.int8), integers)


@pytest.mark.skipif(not INSTALLED, reason="torch_to_nnef is not installed")
@pytest.mark.parametrize("name", ["min_max_q4_0_with_embeddings", "min_max_q4_0_with_embeddings_99"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_converted_model_has_the_integers_of_the_preset(name: str, tie: bool) -> None:
    from torch_to_nnef.compress import DEFAULT_COMPRESSION

    model = net(tie=tie)
    # Layers of 48 inputs, which torch_to_nnef leaves float with a line in its log, are an error here.
    made = Recipe.load(name).prepend(Rule(None, name="down"))
    quantized = qaware.quantize(model, made, calibration=ids())
    reference = DEFAULT_COMPRESSION[name](net(tie=tie))
    assert set(quantized.weights) == {"embed", "gate", "up", "head"}
    for layer, weight in quantized.weights.items():
        expected = reference.get_submodule(layer).weight
        assert torch.equal(weight.data.int(), expected.decompress_to_u8().int().flatten(1) - 8)
        assert torch.equal(weight.scale, expected.qscheme.scale.float().reshape(weight.scale.shape))


@pytest.mark.skipif(not INSTALLED, reason="torch_to_nnef is not installed")
def test_convolutions_too() -> None:
    torch.manual_seed(0)
    model = Convolutions().eval()
    made = Recipe.load("min_max_q4_0_all").prepend(Rule(None, name="up"))
    quantized = qaware.quantize(model, made, calibration=ids())
    assert set(quantized.weights) == {"embed", "conv1", "conv2", "down"}
    for layer, weight in quantized.weights.items():
        integers, scale = theirs(model.get_submodule(layer).weight, 1.0)
        assert torch.equal(weight.data, integers)
        assert torch.equal(weight.scale, scale)


def test_a_head_is_parted_from_an_embedding_that_stays_float_and_the_report_says_so() -> None:
    model = net(tie=True)
    made = Recipe.load("min_max_q4_0").prepend(Rule(None, name="down"))
    quantized = qaware.quantize(model, made)
    assert torch.equal(quantized.module.embed.weight, model.embed.weight)
    assert quantized.rounding is not None
    (head,) = [layer for layer in quantized.rounding.layers if layer.name == "head"]
    assert head.tie == "untied from embed, which has another scheme"


def test_a_group_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(QawareError, match="down: group_size 32 does not divide its 48 input weights"):
        qaware.quantize(net(), "min_max_q4_0")


@pytest.mark.parametrize(
    "scheme",
    [{"bits": 4, "group_size": 32}, {**Q4_0, "symmetric": False}, {**Q4_0, "bits": 2, "levels": "ternary"}],
)
def test_another_grid_is_refused_when_the_recipe_is_read(scheme: dict[str, object]) -> None:
    with pytest.raises(QawareError, match=r"^rounding: q4-0 is for symmetric integers with scale_dtype: flo"):
        recipe("q4-0", scheme)


def test_float16_layers_may_stand_beside() -> None:
    rules = [{"type": "Embedding", "scheme": {"bits": 16}}, {"type": "Linear", "scheme": Q4_0}]
    assert Recipe.from_dict({"rounding": {"q4-0": {"share": 0.95}}, "rules": rules}).rounds
