"""``qaware::attend``: what it computes, and that the compiled kernel computes that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qaware import machine
from qaware.exporters import get_exporter
from qaware.exporters.aoti_attention import AttendingStep, can_attend
from qaware.exporters.aoti_compile import as_usual, compile_package
from qaware.exporters.aoti_load import load
from qaware.exporters.aoti_product import FEATURES
from qaware.exporters.generation import CacheSpec, StaticStep
from qaware.lm import CausalLM

SHAPES = ((4, 2, 16, 16), (6, 1, 32, 80), (2, 2, 48, 64))
"""Heads, heads of keys, width of a key and of a value."""
SCALE = 0.3


class Every(nn.Module):
    """Something before and after each call, that must not be fused into the kernel."""

    def forward(self, positions: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        calls = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        return tuple(torch.ops.qaware.attend(q * 2, k, v, positions, SCALE) + 1 for q, k, v in calls)


def inputs(tokens: int, held: int, start: int) -> tuple[Tensor, ...]:
    """What the last token does not see is not a number."""
    random = torch.Generator().manual_seed(tokens + start)
    tensors = []
    for heads, shared, dim, width in SHAPES:
        keys = torch.randn(1, shared, held, dim, generator=random)
        values = torch.randn(1, shared, held, width, generator=random)
        keys[:, :, start + tokens :] = values[:, :, start + tokens :] = torch.nan
        tensors += [torch.randn(1, tokens, heads, dim, generator=random) * 3, keys, values]
    return torch.arange(start, start + tokens), *tensors


def expected(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """One token and one head at a time, in float64."""
    made = torch.zeros(*query.shape[:3], values.shape[3], dtype=torch.float64)
    shared = query.shape[2] // keys.shape[1]
    for token, at in enumerate(positions.tolist()):
        for head in range(query.shape[2]):
            seen = keys[0, head // shared, : at + 1].double()
            weights = (seen @ query[0, token, head].double() * SCALE).softmax(0)
            made[0, token, head] = weights @ values[0, head // shared, : at + 1].double()
    return made


def check(outputs: Any, positions: Tensor, tensors: tuple[Tensor, ...]) -> None:
    for i, found in enumerate(outputs):
        query, keys, values = tensors[3 * i : 3 * i + 3]
        right = expected(2 * query, keys, values, positions) + 1
        assert (found - right).abs().max() < 1e-5 * values.nan_to_num().abs().max(), SHAPES[i]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if why := get_exporter("aoti").missing():
        pytest.skip(why)
    if not set(FEATURES) <= set(machine.cpu()["features"]):
        pytest.skip("the kernel is for CPUs with AVX512-VNNI")
    tokens, held = torch.export.Dim("tokens", max=64), torch.export.Dim("held", min=2, max=128)
    axes = ({0: tokens}, ({1: tokens}, {2: held}, {2: held}) * len(SHAPES))
    path = tmp_path_factory.mktemp("attend") / "every.pt2"
    with as_usual():
        program = torch.export.export(Every(), inputs(3, 9, 2), dynamic_shapes=axes, strict=False)
        compile_package(program, path, frozen=False, packed=False, cache=None)
    return load(path)


@pytest.mark.parametrize(
    ("tokens", "held", "start"), [(1, 2, 0), (1, 33, 32), (1, 64, 40), (5, 9, 0), (7, 64, 30), (40, 128, 60)]
)
def test_a_token_attends_to_those_up_to_it(compiled: Any, tokens: int, held: int, start: int) -> None:
    positions, *tensors = inputs(tokens, held, start)
    check(compiled.run([positions, *tensors]), positions, tuple(tensors))


def test_positions_in_any_order(compiled: Any) -> None:
    _, *tensors = inputs(8, 64, 20)
    positions = torch.tensor([27, 3, 0, 16, 15, 22, 8, 1])
    check(compiled.run([positions, *tensors]), positions, tuple(tensors))


def test_large_scores_are_one_choice(compiled: Any) -> None:
    positions, *tensors = inputs(4, 32, 20)
    tensors[::3] = [query * 1e4 for query in tensors[::3]]
    outputs = compiled.run([positions, *tensors])
    assert all(bool(found.isfinite().all()) for found in outputs)
    check(outputs, positions, tuple(tensors))


def test_the_operator_computes_the_same() -> None:
    positions, *tensors = inputs(6, 20, 14)
    check(Every()(positions, *tensors), positions, tuple(tensors))


def test_threads_change_nothing(compiled: Any) -> None:
    before = torch.get_num_threads()
    alone = compiled.run(list(inputs(40, 128, 60)))
    try:
        torch.set_num_threads(2)
        together = compiled.run(list(inputs(40, 128, 60)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def lm(**more: Any) -> CausalLM:
    torch.manual_seed(0)
    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return CausalLM({**config, "max_position_embeddings": 32, **more}).eval()


def test_a_step_computes_what_it_does_without_the_kernel() -> None:
    module = lm()
    ids, spec = torch.arange(9).unsqueeze(0), CacheSpec(32, tuple(module.cache_shapes(32)))
    with torch.no_grad():
        found, right = (
            kind(module)(ids, torch.arange(9), *spec.empty()) for kind in (AttendingStep, StaticStep)
        )
    assert torch.allclose(found, right, atol=1e-5)


def test_which_models_attend() -> None:
    def fits(module: CausalLM) -> bool:
        return can_attend(module, CacheSpec(32, tuple(module.cache_shapes(32))))

    assert fits(lm())
    assert not fits(lm().bfloat16())
    assert not fits(lm(hidden_size=48))  # keys of 12 numbers
    assert not fits(lm(model_type="gpt_oss", head_dim=16))  # has sinks
