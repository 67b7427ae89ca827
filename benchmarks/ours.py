"""Our artifacts: exported and opened by the exporters as they are, nothing tuned here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.contender import CNN, LM, Contender, Runtime, Session
from benchmarks.inputs import PREFILL, SIZES, Array, Size, images, tokens
from benchmarks.speed_models import calibration, convolutions, language_model
from qaware import quantize
from qaware.engines.base import QuantizedModel
from qaware.exporters import get_exporter
from qaware.exporters.artifact import sidecar_path
from qaware.exporters.signature import Signature, TensorSpec
from qaware.plan import Plan
from qaware.recipe import Recipe
from qaware.tasks import language_signature

FLOAT: dict[str, Any] = {"name": "float", "rules": [{"name": "*", "scheme": None}]}


def _int4(activation: str, embedding: int) -> dict[str, Any]:
    """The shipped int4 recipes, with embeddings of 4 or 8 bits."""
    grouped = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
    table = grouped if embedding == 4 else {"bits": embedding}
    return {
        "name": f"int4-embedding{embedding}",
        "rules": [
            {"role": "embedding", "scheme": table},
            {"type": "Linear", "scheme": {**grouped, "activation": activation}},
        ],
    }


class Ours(Runtime):
    """One exporter. ``recipes`` has what each variant is quantized with."""

    packages = ("torch",)
    recipes: ClassVar[dict[str, str | dict[str, Any]]]

    def missing(self) -> str | None:
        """The exporter's own answer."""
        return get_exporter(self.name).missing()

    def imports(self) -> None:
        """Torch, which every runner takes its tensors from, and qaware itself."""
        get_exporter(self.name)

    def build(self, model: str, variant: str, size: str, folder: Path) -> Contender:
        """Quantize to nearest, or not at all, and export."""
        exporter, chosen = get_exporter(self.name), SIZES[size]
        quantized, signature, example = self._quantized(model, variant, chosen)
        path = folder / f"{model}-{variant}{exporter.suffix}"
        artifact = exporter.export(quantized, (example,), signature, path)
        note = "; ".join([quantized.plan.recipe.name, *artifact.notes])
        return Contender(self.name, model, variant, str(path), artifact.bytes, note=note)

    def open(self, contender: Contender, size: str, threads: int) -> Session:
        """The exporter's runner, with a key-value cache where the artifact has one."""
        self.set_threads(threads)
        path = Path(contender.path)
        recorded = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
        runner: Any = get_exporter(self.name).open(path, Signature.from_dict(recorded["signature"]))
        chosen = SIZES[size]
        if contender.model == CNN:
            image = torch.from_numpy(images(1, chosen.image))
            return {"image": lambda: _array(runner(image))}
        return _language_session(runner, torch.from_numpy(tokens(chosen.vocabulary)))

    def set_threads(self, threads: int) -> None:
        """Torch's own pool; runtimes with another one have more to do."""
        torch.set_num_threads(threads)

    def _quantized(self, model: str, variant: str, size: Size) -> tuple[QuantizedModel, Signature, Tensor]:
        module: Any
        if model == LM:
            module, batches = language_model(size), None
            example = torch.from_numpy(tokens(size.vocabulary))[:, :8]
            signature = language_signature("input_ids", size.vocabulary, size.context)
        else:
            module, batches = convolutions(size), calibration(size)
            example = batches[0]
            signature = Signature((TensorSpec("image", "float32", tuple(example.shape)),))
        if variant == "fp32":
            return QuantizedModel(module, Plan(Recipe.load(FLOAT), ()), {}), signature, example
        recipe = self.recipes[variant] if model == LM else "int8-static"
        return quantize(module, recipe, batches, runtimes=(self.name,)), signature, example


class ExecuTorch(Ours):
    """``.pte``, XNNPACK."""

    name = "executorch"
    variants: ClassVar = {LM: ("fp32", "int8", "int4", "int4-embedding8"), CNN: ("fp32", "int8")}
    recipes: ClassVar = {
        "int8": "int8-dynamic",
        "int4": "int8-dynamic-int4-weight",
        "int4-embedding8": _int4("int8-dynamic", 8),
    }

    def imports(self) -> None:
        """The runtime with its kernels too."""
        super().imports()
        import executorch.kernels.quantized
        import executorch.runtime  # noqa: F401

    def set_threads(self, threads: int) -> None:
        """XNNPACK's pool, which follows neither torch nor the environment."""
        from executorch.extension.pybindings import portable_lib

        super().set_threads(threads)
        portable_lib._unsafe_reset_threadpool(threads)


class AOTI(Ours):
    """``.pt2``, native code of Inductor."""

    name = "aoti"
    variants: ClassVar = {LM: ("fp32", "int8", "int4"), CNN: ("fp32", "int8")}
    recipes: ClassVar = {"int8": "int8-dynamic", "int4": _int4("int8-dynamic", 8)}


class Tract(Ours):
    """``.nnef.tgz``; products run on the calling thread only."""

    name = "tract"
    variants: ClassVar = {LM: ("fp32", "int4"), CNN: ("fp32", "int8")}
    recipes: ClassVar = {"int4": _int4("none", 8)}

    def imports(self) -> None:
        """The runtime too."""
        super().imports()
        import tract  # noqa: F401


def _language_session(runner: Any, ids: Tensor) -> Session:
    text, last = ids[:, :PREFILL].contiguous(), ids[:, PREFILL:].contiguous()
    if not getattr(runner, "length", 0):
        return {"alone": lambda: _array(runner(last)), "prefill": lambda: _array(runner(text))}
    runner(text)  # fills the cache that every decode reads; each one writes at the same place again
    return {
        "prefill": lambda: _array(runner(text)),
        "decode": lambda: _array(runner.step(last, PREFILL)),
    }


def _array(logits: Tensor) -> Array:
    return logits.detach().numpy()
