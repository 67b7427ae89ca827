"""``qaware::product``: what it computes, and that the compiled kernel computes exactly that."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qaware import machine
from qaware.engines.base import ActivationRange
from qaware.exporters import get_exporter
from qaware.exporters.aoti_compile import as_usual, compile_package
from qaware.exporters.aoti_load import load
from qaware.exporters.aoti_product import FEATURES, arrange, by_lane, codes_of, columns
from qaware.exporters.aoti_tokens import integers

KINDS = ("none", "int8-dynamic", "int8-static")
STATIC = ActivationRange(0.0371, -11)


class Product(nn.Module):
    """One weight of random codes, with what the operator needs."""

    def __init__(
        self,
        rows: int,
        width: int,
        bits: int,
        group: int,
        activation: str,
        dtype: torch.dtype = torch.bfloat16,
        zeros: bool = False,
        offset: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(rows + bits)
        groups = width // group
        codes = torch.randint(0, 2**bits, (rows, width), generator=random, dtype=torch.uint8)
        scale = (torch.rand(rows, groups, generator=random) + 0.1).to(dtype)
        zero = torch.randint(-3, 4, (rows, groups), generator=random, dtype=torch.int8)
        self.offset = 2**bits if offset is None else offset
        shift = self.offset / 2 + (zero.double().unsqueeze(-1) if zeros else 0)
        blocks = (codes.double().view(rows, groups, group) - shift) * scale.double().unsqueeze(-1) * step
        self.numbers = (rows, bits, group, self.offset, step)
        self.activation, self.width, self.weight = activation, width, blocks.flatten(1)
        self.register_buffer("codes", arrange(codes, bits))
        self.register_buffer("scale", by_lane(scale))
        self.register_buffer("zero", by_lane(zero) if zeros else None)
        self.register_buffer("sums", None if activation == "none" else self.weight.sum(1).float())

    def forward(self, x: Tensor) -> Tensor:
        stored = (self.codes, self.scale, self.zero, self.sums)
        rounding = (self.activation, STATIC.scale, STATIC.zero_point)
        y: Tensor = torch.ops.qaware.product(x[:, : self.width], *stored, *self.numbers, *rounding)
        return y

    def expected(self, x: Tensor) -> Tensor:
        values, scale, zero = integers(x[:, : self.width], self.activation, STATIC if self.static else None)
        y = values[0].double() if zero is not None else 256 * values[0].double() + values[1]
        y = y if zero is None else y - zero.unsqueeze(1)
        return (y @ self.weight.T) * scale.double().unsqueeze(1)

    @property
    def static(self) -> bool:
        return self.activation == "int8-static"


def products() -> list[Product]:
    """Every width, both kinds of activations, odd sizes, and every way in which a code is no integer."""
    return [
        *(Product(32, 96, bits, 32, kind) for bits in (1, 2, 4, 8) for kind in KINDS),
        Product(33, 96, 4, 96, KINDS[1], torch.float32),
        Product(7, 64, 4, 16, "none", torch.float16, zeros=True),
        Product(48, 96, 8, 96, KINDS[1], torch.float32, zeros=True),
        Product(16, 64, 2, 32, KINDS[1], offset=3, step=2),
        Product(20, 96, 1, 32, "none", offset=1, step=2),
        Product(40, 64, 2, 64, KINDS[2], torch.float16, offset=2),
        Product(4112, 32, 4, 32, KINDS[1]),  # results of 64 tokens that do not stay in a cache
    ]


def inputs(tokens: int) -> Tensor:
    """Tokens of many sizes, some of one sign, and one of zeros."""
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 96, generator=random) * 10 ** torch.randn(tokens, 1, generator=random)
    x[2::5].abs_()
    x[3::7] = 0
    return x


def test_a_wrong_number_stays_one(compiled: Any) -> None:
    x = inputs(3)
    x[1, 40] = torch.nan
    for product, found in zip(products(), compiled.run([x]), strict=True):
        assert not found[[0, 2]].isnan().any()
        assert found[1].isnan().all() or product.static or product.width <= 40


def near(found: Tensor, expected: Tensor) -> bool:
    """Exact sums, scaled and added in float32."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_come_back(bits: int) -> None:
    for rows in (1, 16, 37):
        codes = torch.randint(0, 2**bits, (rows, 3 * columns(bits)), dtype=torch.uint8)
        packed = arrange(codes, bits)
        assert packed.shape == (-(-rows // 16), 3, 64)
        assert torch.equal(joined(codes_of(packed, bits))[:rows], codes.float())
        picked = torch.tensor([[rows - 1, 0]])
        assert torch.equal(joined(codes_of(packed, bits, picked)), codes[picked].float())


def joined(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, -2).flatten(-3)


def test_four_columns_of_a_row_lie_together() -> None:
    codes = torch.arange(16 * 8, dtype=torch.uint8).view(16, 8) % 16
    packed = arrange(codes, 4)[0, 0]
    low, high = codes[1].chunk(2)
    assert torch.equal(packed[4:8], low + 16 * high)


@pytest.mark.parametrize("index", range(len(products())))
def test_the_operator_multiplies_integers(index: int) -> None:
    product = products()[index]
    assert near(product(inputs(5)), product.expected(inputs(5)))


class Every(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.products = nn.ModuleList(products())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # Something before and after each, that must not be fused into the kernel.
        return tuple(product(x + 1) * 2 for product in self.products)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if why := get_exporter("aoti").missing():
        pytest.skip(why)
    if not set(FEATURES) <= set(machine.cpu()["features"]):
        pytest.skip("the kernel is for CPUs with AVX512-VNNI")
    tokens = torch.export.Dim("tokens", min=1, max=64)
    path = tmp_path_factory.mktemp("product") / "every.pt2"
    with as_usual():
        program = torch.export.export(
            Every().eval(), (inputs(3),), dynamic_shapes=({0: tokens},), strict=False
        )
        compile_package(program, path, frozen=False, packed=False, cache=None)
    return path


@pytest.fixture(scope="module")
def compiled(package: Path) -> Any:
    return load(package)


@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 7, 13, 64])
def test_the_kernel_computes_what_the_operator_does(compiled: Any, tokens: int) -> None:
    outputs = compiled.run([inputs(tokens)])
    for product, found in zip(products(), outputs, strict=True):
        assert near(found, 2 * product.expected(inputs(tokens) + 1)), product.numbers


def test_threads_change_nothing(compiled: Any) -> None:
    """Each computes its own rows."""
    before = torch.get_num_threads()
    alone = compiled.run([inputs(13)])
    try:
        torch.set_num_threads(2)
        together = compiled.run([inputs(13)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_kernel_is_in_the_library(package: Path) -> None:
    """A file that called the operator would need this library where it runs."""
    with zipfile.ZipFile(package) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".wrapper.cpp")]
        code = archive.read(name).decode()
    assert re.search(r"cpp_fused_\w*product\w*\(", code)
    assert "aoti_torch_proxy_executor_call_function(" not in code
