"""What Inductor is told: for how long, and of what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor import lowering

from qaware.exporters.aoti_kernels import source
from qaware.exporters.aoti_template import register, shared

TABLE: Any = lowering.lowerings


def test_cosines_are_lowered_as_before_afterwards() -> None:
    operators = [torch.ops.aten.cos.default, torch.ops.aten.sin.default]
    before = [TABLE[operator] for operator in operators]
    with shared():
        assert all(TABLE[o] is not b for o, b in zip(operators, before, strict=True))
    assert [TABLE[operator] for operator in operators] == before


def test_operators_are_registered_once() -> None:
    register()
    operators = [torch.ops.qaware.product.default, torch.ops.qaware.attend.default]
    before = [TABLE[operator] for operator in operators]
    register()
    assert [TABLE[operator] for operator in operators] == before


@pytest.mark.parametrize("name", ["vectors", "rounding", "product", "attention"])
def test_headers_may_be_written_twice(name: str) -> None:
    """Each call of a kernel brings its own."""
    code = source(f"aoti_{name}.h")
    assert f"#ifndef QAWARE_{name.upper()}\n#define QAWARE_{name.upper()}\n" in code
    assert code.endswith("#endif\n")
    assert '#include "' not in code
