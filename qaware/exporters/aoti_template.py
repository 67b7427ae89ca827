"""How Inductor compiles our operators, and what it would do twice otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor import lowering

# Both define the operators that are registered here.
from qaware.exporters import aoti_attention, aoti_product  # noqa: F401
from qaware.exporters.aoti_kernels import call

_PRODUCT = """
  using Form = qaware::Form<{bits}, {digits}, {unrolled}, {offset}, {step}, {zeros}>;
  using Scale = {scale_type};
  const qaware::Weight<Scale> weight{{{codes}, reinterpret_cast<const Scale*>({weight_scale}), {weight_zero},
                                     {sums}, {rows}, {width}, {group}, {width} / {group}}};
  const qaware::Rounding how{{qaware::Activation::{activation}, float({scale!r}), float({inverse!r}),
                             {zero}}};
  qaware::product<Form>({x}, {count}, how, weight, {out});
"""
_ATTEND = """
  qaware::attend({{{query}, {keys}, {values}, {positions}, {tokens}, {heads}, {kv_heads}, {held}, {dim},
                  {out_dim}, float({scale!r})}}, {out});
"""
_SCALES = {torch.float32: "float", torch.bfloat16: "qaware::Bfloat16", torch.float16: "qaware::Float16"}
_SHORT = 128
"""Columns of a group whose loop is written out."""
_SHARED = (torch.ops.aten.cos.default, torch.ops.aten.sin.default)
"""Rotary embeddings: computed for each head of each layer, by Inductor's rules, instead of once."""


def register() -> None:
    """Tell Inductor of the operators."""
    ops: Any = torch.ops.qaware
    for operator, lower in ((ops.product.default, _product), (ops.attend.default, _attend)):
        if operator not in lowering.lowerings:
            lowering.register_lowering(operator, type_promotion_kind=None)(lower)


@contextmanager
def shared() -> Iterator[None]:
    """Keep cosines and sines in memory instead of computing them again wherever they are used."""
    table: Any = lowering.lowerings
    before = {operator: table[operator] for operator in _SHARED}
    try:
        table.update({operator: _realized(lower) for operator, lower in before.items()})
        yield
    finally:
        table.update(before)


def _realized(lower: Any) -> Any:
    def lowered(*arguments: Any, **options: Any) -> Any:
        made = lower(*arguments, **options)
        made.realize()
        return made

    return lowered


def _product(
    x: Any,
    codes: Any,
    weight_scale: Any,
    weight_zero: Any,
    sums: Any,
    rows: int,
    bits: int,
    group: int,
    offset: int,
    step: int,
    activation: str,
    scale: float,
    zero: int,
) -> Any:
    """Inductor's node for ``qaware::product``."""
    inputs = {"x": x, "codes": codes, "weight_scale": weight_scale, "weight_zero": weight_zero, "sums": sums}
    numbers = {"rows": rows, "bits": bits, "group": group, "offset": offset, "step": step}
    numbers |= {"digits": 2 if activation == "none" else 1, "unrolled": group if group <= _SHORT else 0}

    def body(pointers: dict[str, str], size: Any) -> str:
        return _PRODUCT.format(
            count=size("x", 0),
            width=size("x", 1),
            zeros=str(weight_zero is not None).lower(),
            scale_type=_SCALES[weight_scale.get_dtype()],
            activation=activation.replace("-", "_"),
            scale=scale,
            inverse=1 / scale,
            zero=zero,
            **{"weight_zero": "nullptr", "sums": "nullptr", **pointers},
            **numbers,
        )

    headers = ("aoti_vectors.h", "aoti_rounding.h", "aoti_product.h")
    return call("product", headers, inputs, [x.get_size()[0], rows], body)


def _attend(query: Any, keys: Any, values: Any, positions: Any, scale: float) -> Any:
    """Inductor's node for ``qaware::attend``."""
    inputs = {"query": query, "keys": keys, "values": values, "positions": positions}

    def body(pointers: dict[str, str], size: Any) -> str:
        sizes = {"tokens": size("query", 1), "heads": size("query", 2), "dim": size("query", 3)}
        sizes |= {"kv_heads": size("keys", 1), "held": size("keys", 2), "out_dim": size("values", 3)}
        return _ATTEND.format(scale=scale, **pointers, **sizes)

    shape = [*query.get_size()[:3], values.get_size()[3]]
    return call("attend", ("aoti_vectors.h", "aoti_attention.h"), inputs, shape, body)
