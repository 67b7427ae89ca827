"""The C++ of our kernels for AOTInductor, and how Inductor writes it into a library that it compiles.

The file needs nothing of qaware where it runs: an operator's code is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.ir import ExternKernel

Body = Callable[[dict[str, str], Callable[[str, int], str]], str]
"""``(pointers, size)`` to the statements of a kernel: C++ names of the inputs and of ``out``, and the C++ of
an input's length along an axis."""
_FUNCTION = """
extern "C" {signature} {{
{body}
}}
"""


class KernelTemplate(CppTemplate):  # type: ignore[misc]
    """One call of a kernel.

    Args:
        name: of the kernel.
        headers: files of this package that it needs, in order.
        inputs: by their names in ``body``.
        layout: of the result.
        body: what it does.
    """

    def __init__(
        self, name: str, headers: tuple[str, ...], inputs: Mapping[str, Any], layout: Any, body: Body
    ) -> None:
        super().__init__(f"qaware_{name}", list(inputs.values()), layout, num_threads=1)
        self.headers, self.inputs, self.body = headers, inputs, body

    def render(self, **given: Any) -> str:
        """C++ of a function that writes the result."""
        kernel, node = given["kernel"], given.get("template_buffer_node")
        out = self.output_node if node is None else node
        signature = kernel.def_kernel(inputs=dict(self.inputs), outputs={"out": out})
        # A buffer may be part of a larger one.
        pointers = {
            name: f"&{kernel.index(node, [0] * len(node.get_size()))}"
            for name, node in {**self.inputs, "out": out}.items()
        }
        body = self.body(pointers, lambda name, axis: str(kernel.size(self.inputs[name], axis)))
        sources = "\n".join(source(header) for header in self.headers)
        return f"{self.header().getvalue()}\n{sources}\n{_FUNCTION.format(signature=signature, body=body)}"


def call(name: str, headers: tuple[str, ...], inputs: Mapping[str, Any], shape: list[Any], body: Body) -> Any:
    """Inductor's node for a call that makes a float32 tensor of ``shape``; see KernelTemplate."""
    nodes = {name: _buffer(tensor) for name, tensor in inputs.items() if tensor is not None}
    layout = ir.FixedLayout(next(iter(nodes.values())).get_device(), torch.float32, shape)
    made = KernelTemplate(name, headers, nodes, layout, body).generate().output_node()
    # What comes after it is compiled as a loop of its own.
    made.data.data.allow_epilogue_fusion = False
    return made


def source(header: str) -> str:
    """C++ of a file of this package."""
    return (files("qaware.exporters") / header).read_text(encoding="utf-8")


def _buffer(tensor: Any) -> Any:
    """Contiguous, in memory."""
    node = ExternKernel.require_contiguous(ExternKernel.realize_input(tensor))
    while isinstance(node, (ir.TensorBox, ir.StorageBox)):
        node = node.data
    return node
