"""PyTorch itself: eager, ``torch.compile``, and torchao's int8 weights and int8 activations, eager.

The static-shape step of the other peers; nothing is exported, so the file is the weights as torch saves them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from benchmarks.contender import CNN, LM, Contender, Runtime, Session
from benchmarks.inputs import SIZES, images, texts


class Torch(Runtime):
    """Eager and compiled."""

    name = "torch"
    packages = ("torch", "torchao")
    variants: ClassVar = {LM: ("fp32", "compiled", "int8-weight", "int8"), CNN: ("fp32", "compiled")}

    def build(self, model: str, variant: str, size: str, folder: Path) -> Contender:
        """The state dict."""
        import torch

        path = folder / f"{model}-{variant}.pt"
        torch.save(_module(model, variant, size).state_dict(), path)
        note = {"compiled": "torch.compile", "fp32": "eager"}.get(variant, "torchao, eager")
        return Contender(self.name, model, variant, str(path), path.stat().st_size, note=note)

    def open(self, contender: Contender, size: str, threads: int) -> Session:
        """Build the module, compile it where asked."""
        import torch

        torch.set_num_threads(threads)
        module: Any = _module(contender.model, contender.variant, size)
        if contender.model == LM:
            from benchmarks.peers.step import Step

            module = Step(module)
        if contender.variant == "compiled":
            module = torch.compile(module, dynamic=False)
        if contender.model == CNN:
            image = torch.from_numpy(images(1, SIZES[size].image))
            return {"image": lambda: _run(module, image)[0]}
        return _language_session(module, size)


def _language_session(module: Any, size: str) -> Session:
    import torch

    text, last = (torch.from_numpy(ids) for ids in texts(SIZES[size]))
    past = [torch.from_numpy(array) for array in _run(module, text)[1:]]
    return {"prefill": lambda: _run(module, text)[0], "decode": lambda: _run(module, last, *past)[0]}


def _run(module: Any, *inputs: Any) -> list[Any]:
    import torch

    with torch.inference_mode():
        answer = module(*inputs)
    return [tensor.numpy() for tensor in (answer if isinstance(answer, tuple) else (answer,))]


def _module(model: str, variant: str, size: str) -> Any:
    from torchao import quantization

    from benchmarks.speed_models import convolutions, language_model

    module = language_model(SIZES[size]) if model == LM else convolutions(SIZES[size])
    if variant == "int8-weight":
        quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    elif variant == "int8":
        quantization.quantize_(module, quantization.Int8DynamicActivationInt8WeightConfig())
    return module
