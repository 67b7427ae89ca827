"""ExecuTorch: a ``.pte`` file whose layers run on XNNPACK (arm64 and x86-64 CPUs)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.base import Exporter, Runner, Tolerance, Written, one_step
from qaware.exporters.delegation import delegation
from qaware.exporters.executorch_cache import KernelStep, PortableStep
from qaware.exporters.executorch_errors import explained
from qaware.exporters.executorch_limits import refusal, signed_scales, widened
from qaware.exporters.executorch_lowering import (
    exported,
    fit_kernels,
    partitioner,
    require_sizes,
    widen,
    with_whole_biases,
)
from qaware.exporters.executorch_rewrite import rewritten
from qaware.exporters.generation import CachedRunner, CacheSpec, attends, cache_of
from qaware.exporters.signature import Signature
from qaware.plan import Decision, Plan

log = logging.getLogger(__name__)


class ExecuTorchExporter(Exporter):
    """Lowers to ExecuTorch's XNNPACK backend and runs on the runtime inside its wheel."""

    name = "executorch"
    suffix = ".pte"
    packages = ("executorch",)
    extra = "executorch"
    # Dropping the scales of a single layer costs 0.10 at least, half or double ones 0.03 to 0.8.
    tolerance = Tolerance(
        relative=0.05,
        kl=5e-3,
        reason=(
            "an activation between two int8 steps may be rounded to the other one, which grows with depth: "
            "0.008 and 1.2e-3 nats in 5 trained layers, 0.046 in 24 random ones; float16 layers: 0.003"
        ),
    )

    def __init__(self, *, cache_length: int | None = None, attention: str = "kernel") -> None:
        """
        Args:
            cache_length: of a language model, tokens that its key-value cache holds; default the model's
                context, at most 1024. Each takes memory.
            attention: of a language model, ``kernel``: ExecuTorch's LLM kernels, which the app must link, or
                ``portable``: operators of every build, four times slower for one token.

        Raises:
            QawareError: another attention.
        """
        if attention not in ("kernel", "portable"):
            raise QawareError(f"attention: {attention!r} is not one of kernel, portable")
        self.cache_length, self.attention = cache_length, attention

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """One step of the output where it is an integer."""
        return one_step(self.tolerance) if plan.layout is not None else self.tolerance

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """Float16 arithmetic, and what is stored twice."""
        chosen = []
        if any(d.scheme and d.scheme.is_float for d in plan.quantized.values()):
            chosen.append("float16 linear layers multiply float16 activations; between layers it is float32")
        if any(d.scheme and d.scheme.is_static and d.scheme.bits < 8 for d in plan.quantized.values()):
            chosen.append("weights of layers with static activations take 8 bits each, whatever their width")
        wide = sorted({wider for d in plan.quantized.values() if (wider := widened(d))})
        if wide:
            chosen.append(f"weights take the width of their kernels: {', '.join(wide)}")
        if any(d.tied_to for d in plan.quantized.values()):
            chosen.append("an embedding and a head that share a weight are stored twice")
        return tuple(chosen)

    def refuse(self, decision: Decision) -> str | None:
        """Why XNNPACK, or ExecuTorch's embedding kernels, cannot hold one layer as planned."""
        return refusal(decision)

    def unpacks(self, decision: Decision) -> str | None:
        """Nothing: what has no kernel is refused."""
        return None

    def refuse_plan(self, plan: Plan) -> str | None:
        """Scales below zero."""
        return signed_scales(plan)

    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written:
        """Export with the dynamic axes of ``signature``, lower to XNNPACK and write ``path``.

        Raises:
            QawareError: lowering limits a dynamic axis.
        """
        with _bare_root_logger():
            from executorch.exir import ExecutorchBackendConfig

            fit_kernels(quantized)
            cache = cache_of(quantized.module, signature, self.cache_length)
            hold: Callable[[nn.Module], nn.Module] | None = None
            about: dict[str, Any] = {}
            linked: tuple[str, ...] = ()
            if cache is not None:
                step = self._step(quantized.module, cache)
                hold, about = functools.partial(step, cache=cache), _about(cache, signature)
                linked = (_LINKED,) if step is KernelStep else ()
            program = exported(quantized.module, example, signature, hold)
            edge = _partitioned(program, about, bool(linked))
            require_sizes(program, edge.exported_program())
            found = delegation(edge.exported_program())
            # The flag fuses quantized embeddings, which have no kernel otherwise.
            lowered = edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
        with path.open("wb") as file:
            lowered.write_to_file(file)
        return Written((*found.lines(), *linked), {"delegation": dataclasses.asdict(found)})

    def _step(self, module: nn.Module, cache: CacheSpec) -> type[KernelStep] | type[PortableStep]:
        # A single head leaves the order of its axes open, which the kernels' check takes for a wrong one.
        several = all(heads > 1 for heads, _ in cache.shapes)
        kernel = self.attention == "kernel" and several and attends(module)
        return KernelStep if kernel else PortableStep

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """The converted model; of a bfloat16 one the same integers in float32, of the graph engine's, whose
        biases are float, one with the whole numbers that XNNPACK makes of them."""
        if quantized.plan.layout is not None and quantized.plan.layout.engine == "graph":
            return with_whole_biases(copy.deepcopy(quantized))
        floats = [*quantized.module.parameters(), *quantized.module.buffers()]
        if all(t.dtype != torch.bfloat16 for t in floats):
            return quantized.module
        return widen(copy.deepcopy(quantized.module))

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load ``path``.

        Returns:
            A callable: tensors as in ``signature`` to a float32 tensor of its own.

        Raises:
            QawareError: on loading and on each call, with the runtime's error code in words.
        """
        with _bare_root_logger(), explained(f"{path.name}: cannot be loaded"):
            # They register kernels: of attention with a cache, and of quantized embeddings.
            import executorch.extension.llm.custom_ops.custom_ops
            import executorch.kernels.quantized  # noqa: F401
            from executorch.runtime import Runtime

            # By path: the file is mapped, while bytes would be held twice.
            program = Runtime.get().load_program(path)
            program.load_method("forward")

        def run(*tensors: Tensor) -> Tensor:
            with explained(f"{path.name}: cannot run"):
                # The program keeps the method that it loaded, and this closure the program.
                method = program.load_method("forward")
                output: Tensor = method.execute([t.detach().cpu().contiguous() for t in tensors])[0]
            return output.float()

        if _CACHE not in program.method_names:
            return run
        length = int(program.load_method(_CACHE).execute([])[0])
        return CachedRunner(
            length, signature.longest, lambda ids, at: run(ids, torch.arange(at, at + ids.shape[1]))
        )


def _partitioned(program: Any, about: dict[str, Any], rewrite: bool) -> Any:
    """The program cut into XNNPACK's part and the rest; rewritten before, so that there are few cuts.

    The partitioner may then find parts that depend on each other (seen with portable attention), which is an
    error: such a program is cut as it was.
    """
    from executorch.exir import to_edge_transform_and_lower

    def cut(form: Any) -> Any:
        return to_edge_transform_and_lower(form, partitioner=[partitioner()], constant_methods=about)

    if not rewrite:
        return cut(program)
    try:
        return cut(rewritten(program))
    except AssertionError as error:
        if "dependency cycles" not in str(error):
            raise
        log.info("executorch: XNNPACK's parts would depend on each other; the program is cut as it was")
        return cut(program)


_CACHE = "get_max_context_len"
_LINKED = (
    "attention and its cache are ExecuTorch's LLM kernels (llama::custom_sdpa, llama::update_cache), which "
    "the app must link"
)


def _about(cache: CacheSpec, signature: Signature) -> dict[str, Any]:
    """Methods that say what the program takes, by the names that ExecuTorch's own LLM runner asks for."""
    vocabulary = signature.inputs[0].high
    about = {_CACHE: cache.length, "get_max_seq_len": signature.longest}
    about |= {"use_kv_cache": True, "enable_dynamic_shape": True}
    return about if vocabulary is None else {**about, "get_vocab_size": vocabulary + 1}


@contextlib.contextmanager
def _bare_root_logger() -> Iterator[None]:
    """ExecuTorch's logging gives a root logger without handlers one for good; prevent it."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
