"""How Inductor writes the code of ``qaware::product`` into a library that it compiles."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.ir import ExternKernel

from qaware.exporters.aoti_product import scale_type, source

_BODY = """
extern "C" {signature} {{
  using Form = qaware::Form<{bits}, {digits}, {unrolled}, {offset}, {step}, {zeros}>;
  using Scale = {scale_type};
  const qaware::Weight<Scale> weight{{{codes}, reinterpret_cast<const Scale*>({weight_scale}), {weight_zero},
                                     {sums}, {rows}, {width}, {group}, {width} / {group}}};
  const qaware::Tokens tokens{{{values}, nullptr, {scale}, {zero}, {count}, false}};
  qaware::product<Form>(tokens, weight, {out});
}}
"""
_SHORT = 128
"""Columns of a group whose loop is written out."""
_INPUTS = ("values", "scale", "zero", "codes", "weight_scale", "weight_zero", "sums")


class ProductTemplate(CppTemplate):  # type: ignore[misc]
    """One call of the kernel."""

    def __init__(self, inputs: dict[str, Any], layout: Any, numbers: dict[str, int]) -> None:
        super().__init__("qaware_product", list(inputs.values()), layout, num_threads=1)
        self.inputs, self.numbers = inputs, numbers

    def render(self, **given: Any) -> str:
        """C++ of a function that writes the result."""
        kernel, node = given["kernel"], given.get("template_buffer_node")
        out = self.output_node if node is None else node
        signature = kernel.def_kernel(inputs=self.inputs, outputs={"out": out})
        values = self.inputs["values"]
        pointers = dict.fromkeys(_INPUTS, "nullptr")
        for name, node in self.inputs.items():
            # An input may be part of a larger buffer.
            pointers[name] = f"&{kernel.index(node, [0] * len(node.get_size()))}"
        weight_scale = self.inputs["weight_scale"].get_dtype()
        body = _BODY.format(
            signature=signature,
            digits=kernel.size(values, 0),
            count=kernel.size(values, 1),
            width=kernel.size(values, 2),
            unrolled=self.numbers["group"] if self.numbers["group"] <= _SHORT else 0,
            zeros=str("weight_zero" in self.inputs).lower(),
            scale_type=scale_type(weight_scale),
            out=f"&{kernel.index(out, [0, 0])}",
            **pointers,
            **self.numbers,
        )
        return f"{self.header().getvalue()}\n{source()}\n{body}"


def lower(*arguments: Any) -> Any:
    """Inductor's node for one call; arguments as of ``qaware::product``."""
    tensors, numbers = arguments[: len(_INPUTS)], arguments[len(_INPUTS) :]
    inputs = {n: _buffer(t) for n, t in zip(_INPUTS, tensors, strict=True) if t is not None}
    named = dict(zip(("rows", "bits", "group", "offset", "step"), numbers, strict=True))
    values = inputs["values"]
    layout = ir.FixedLayout(values.get_device(), torch.float32, [values.get_size()[1], named["rows"]])
    made = ProductTemplate(inputs, layout, named).generate().output_node()
    # What comes after it is compiled as a loop of its own.
    made.data.data.allow_epilogue_fusion = False
    return made


def _buffer(tensor: Any) -> Any:
    """Contiguous, in memory."""
    node = ExternKernel.require_contiguous(ExternKernel.realize_input(tensor))
    while isinstance(node, (ir.TensorBox, ir.StorageBox)):
        node = node.data
    return node
