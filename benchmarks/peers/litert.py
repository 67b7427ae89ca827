"""LiteRT, from litert_torch: fp32, and ai-edge-quantizer's dynamic int8 and int4 (blocks of 32).

The embedding is quantized too.  It compiles for fixed shapes only, so the two lengths are two signatures of
one file: 128 tokens without a past, and one token behind a past of exactly 128.  A real loop would need a
mask over a longer cache, which is not timed, in its favour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.contender import CNN, LM, Contender, Runtime, Session
from benchmarks.inputs import PREFILL, SIZES, Size, images, texts

_RECIPES = {"int8": "dynamic_wi8_afp32", "int4": "dynamic_wi4b32_afp32"}


class LiteRT(Runtime):
    """``.tflite`` on the interpreter with XNNPACK."""

    name = "litert"
    packages = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")
    variants: ClassVar = {LM: ("fp32", "int8", "int4"), CNN: ("fp32", "int8")}

    def build(self, model: str, variant: str, size: str, folder: Path) -> Contender:
        """Convert the float model, once for all variants, and quantize its file."""
        source = folder / f"{model}-fp32.tflite"
        if not source.is_file():
            _convert(model, SIZES[size], source)
        if variant == "fp32":
            return Contender(
                self.name, model, variant, str(source), source.stat().st_size, note="litert_torch"
            )
        from ai_edge_quantizer import quantizer, recipe

        path, name = folder / f"{model}-{variant}.tflite", _RECIPES[variant]
        made = quantizer.Quantizer(str(source), getattr(recipe, name)()).quantize().quantized_model
        path.write_bytes(made)
        return Contender(
            self.name, model, variant, str(path), path.stat().st_size, note=f"ai-edge-quantizer {name}"
        )

    def imports(self) -> None:
        """The interpreter alone."""
        import ai_edge_litert.interpreter  # noqa: F401

    def open(self, contender: Contender, size: str, threads: int) -> Session:
        """One interpreter for both signatures."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=contender.path, num_threads=threads)
        if contender.model == CNN:
            run, image = interpreter.get_signature_runner(), images(1, SIZES[size].image)
            return {"image": lambda: run(args_0=image)["output_0"]}
        return _language_session(interpreter, SIZES[size])


def _language_session(interpreter: Any, size: Size) -> Session:
    text, last = (ids.astype(np.int32) for ids in texts(size))
    prefill = interpreter.get_signature_runner("prefill")
    decode = interpreter.get_signature_runner("decode")
    answer = prefill(args_0=text)
    # A copy, because what comes back may be the interpreter's own memory.
    past = {f"args_{i}": answer[f"output_{i}"].copy() for i in range(1, 2 * size.layers + 1)}
    return {
        "prefill": lambda: prefill(args_0=text)["output_0"],
        "decode": lambda: decode(args_0=last, **past)["output_0"],
    }


def _convert(model: str, size: Size, path: Path) -> None:
    import litert_torch
    import torch

    from benchmarks.peers.step import Step, empty
    from benchmarks.speed_models import convolutions, language_model

    if model == CNN:
        litert_torch.convert(convolutions(size), (torch.zeros(1, 3, size.image, size.image),)).export(
            str(path)
        )
        return
    step = Step(language_model(size)).eval()
    text, last = torch.zeros(1, PREFILL, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    first = litert_torch.signature("prefill", step, (text,))
    first.signature("decode", step, (last, *empty(size, PREFILL))).convert().export(str(path))
