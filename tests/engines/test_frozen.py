"""What a frozen weight is rounded to is found once, and again after anything that changes it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qaware.engines.fake_quant import set_fake_quant, set_softness
from qaware.engines.frozen import Kept
from qaware.engines.modules import ModulesEngine
from qaware.engines.weight_fake_quant import WeightFakeQuantizer
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme

INT4 = Scheme(4, 16)


def frozen(seed: int = 0, rows: int = 6) -> nn.Parameter:
    values = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(values, requires_grad=False)


def fresh(weight: Tensor) -> Tensor:
    return WeightFakeQuantizer(INT4)(weight.detach().clone())


def test_the_same_weight_is_rounded_once() -> None:
    quantizer, weight = WeightFakeQuantizer(INT4), frozen()
    first = quantizer(weight)
    scale = quantizer.scale
    assert quantizer(weight) is first
    assert torch.equal(first, fresh(weight))
    # Something else was rounded in between, and to_integers() is for the last.
    quantizer(frozen(1).detach())
    assert quantizer(weight) is first
    assert quantizer.scale is scale


def write(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def write_past_autograd(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def write_one_value_past_autograd(weight: nn.Parameter) -> None:
    weight.data[3, 7] = 5.0


def point_elsewhere(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


def load(weight: nn.Parameter) -> None:
    layer = nn.Linear(32, 6, bias=False)
    layer.weight = weight
    layer.load_state_dict({"weight": frozen(3)})


@pytest.mark.parametrize(
    "change", [write, write_past_autograd, write_one_value_past_autograd, point_elsewhere, load]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_was_written_to_is_rounded_again(
    change: Callable[[nn.Parameter], None], dtype: torch.dtype
) -> None:
    quantizer, weight = WeightFakeQuantizer(INT4), nn.Parameter(frozen().to(dtype), requires_grad=False)
    before = quantizer(weight)
    change(weight)
    after = quantizer(weight)
    assert torch.equal(after, fresh(weight))
    assert not torch.equal(after, before)


def test_a_count_of_bytes_that_fills_no_word() -> None:
    values = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))[:, :15].contiguous()
    weight = nn.Parameter(values.to(torch.bfloat16), requires_grad=False)
    quantizer = WeightFakeQuantizer(Scheme(8))
    assert quantizer(weight) is quantizer(weight)
    write_past_autograd(weight)
    assert torch.equal(quantizer(weight), WeightFakeQuantizer(Scheme(8))(weight.detach()))


def test_another_weight_of_the_same_module() -> None:
    quantizer = WeightFakeQuantizer(INT4)
    for seed in range(4):  # each may get the memory of the one before
        assert torch.equal(quantizer(frozen(seed)), fresh(frozen(seed)))


def test_a_weight_that_trains_is_rounded_anew_and_gets_its_gradient() -> None:
    quantizer, weight = WeightFakeQuantizer(INT4), frozen()
    first = quantizer(weight)
    weight.requires_grad_(True)
    values = quantizer(weight)
    assert values is not first
    values.sum().backward()
    assert weight.grad is not None
    write_past_autograd(weight)  # as some optimizers do
    weight.requires_grad_(False)
    assert torch.equal(quantizer(weight), fresh(weight))


def test_the_state_of_the_quantizer_counts() -> None:
    quantizer, weight = WeightFakeQuantizer(INT4), frozen()
    hard = quantizer(weight)
    set_softness(quantizer, 0.5)
    assert not torch.equal(quantizer(weight), hard)
    set_softness(quantizer, 0.0)
    set_fake_quant(quantizer, False)
    assert quantizer(weight) is weight
    set_fake_quant(quantizer, True)
    assert quantizer(weight) is hard
    scale = torch.full((6, 2), 0.5)
    quantizer.fixed = (scale, torch.zeros(6, 2, dtype=torch.int32))
    assert set((quantizer(weight) / 0.5).unique().tolist()) <= set(range(-8, 8))
    quantizer.fixed = (scale / 2, quantizer.fixed[1])
    assert bool((quantizer(weight) / 0.5 % 1).any())


def test_outside_of_training_nothing_is_kept() -> None:
    quantizer, weight = WeightFakeQuantizer(INT4), frozen()
    with torch.no_grad():
        assert quantizer(weight) is not quantizer(weight)
    with torch.inference_mode():
        assert quantizer(weight) is not quantizer(weight)
    assert quantizer(weight) is quantizer(weight)


def test_who_changes_what_is_kept_changes_nothing_for_the_next() -> None:
    quantizer, weight = WeightFakeQuantizer(INT4), frozen()
    quantizer(weight).zero_()
    assert torch.equal(quantizer(weight), fresh(weight))


def test_copies_begin_empty() -> None:
    quantizer, weight = WeightFakeQuantizer(INT4), frozen()
    first = quantizer(weight)
    keys = list(quantizer.state_dict())
    for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert copied(weight) is not first
        assert torch.equal(copied(weight), first)
    assert keys == list(quantizer.state_dict()) == ["bits"]
    assert quantizer(weight) is first
    quantizer.double()
    assert quantizer(weight) is not first


def test_only_what_is_used_is_held() -> None:
    kept, weight = Kept(), frozen()
    assert kept.of(weight, (), lambda: (weight + 1,)) is kept.of(weight, (), lambda: (weight + 2,))
    about = object()
    other = kept.of(frozen(1), (about,), lambda: (torch.zeros(3),))
    assert len(other[0]) == 3
    kept.clear()
    assert vars(kept) == vars(Kept())


def trained(freeze: bool, recompute: bool = False) -> tuple[list[Tensor], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    ModulesEngine().prepare(model, Recipe("r", (Rule(INT4, type="Linear"),)).match(model))
    model[2].weight.requires_grad_(not freeze)
    if not freeze:  # trained, but never moved
        model[2].weight.register_hook(torch.zeros_like)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for seed in range(4):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        loss = y.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, model


@pytest.mark.parametrize("recompute", [False, True])
def test_training_around_a_frozen_layer_is_the_same(recompute: bool) -> None:
    expected, reference = trained(freeze=False)
    found, model = trained(freeze=True, recompute=recompute)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
