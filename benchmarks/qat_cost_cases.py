"""Training steps whose cost is compared: float, QAT by the engines, torchao's own loop, LoRA-QAT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.eager import EagerEngine
from qaware.engines.example import Example
from qaware.engines.modules import ModulesEngine
from qaware.observers import observers
from qaware.recipe import Recipe
from qaware.vision.networks import CifarResNet

GROUP = 32
RECIPES = {"weight-only": "int4-weight-only", "int8-dynamic": "int8-dynamic-int4-weight"}
ADAPTED = {
    "lora": ("q_proj", "v_proj"),
    "lora everywhere": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""The first is what peft takes for a Llama when it is not told otherwise."""


@dataclass(frozen=True)
class Size:
    """How large the models and batches are; the default is what the targets are for."""

    width: int = 512
    hidden: int = 1024
    blocks: int = 2
    words: int = 1024
    windows: int = 8
    tokens: int = 128
    depth: int = 20
    images: int = 64
    rank: int = 8


_TINY = Size(width=64, hidden=64, blocks=1, words=32, windows=1, tokens=8)


class Step:
    """One training step: forward, backward, AdamW."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor], compiled: bool = False) -> None:
        """
        Args:
            model: in training mode.
            loss: what is minimized, for a callable that stands for the model.
            compiled: run the model through ``torch.compile``.
        """
        self.forward: Any = torch.compile(model) if compiled else model
        self.loss = loss
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def __call__(self) -> float:
        """The loss before the step."""
        self.optimizer.zero_grad()
        loss = self.loss(self.forward)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.detach())


def language_step(kind: str, size: Size, compiled: bool = False) -> Step:
    """A step of a Llama: ``float``; ``weight-only`` or ``int8-dynamic`` by the shipped recipe, behind
    ``torchao `` by torchao's own loop; one of ``ADAPTED`` for int8-dynamic with adapters there."""
    model: Any = _llama(size)
    if kind in ADAPTED:
        model = _with_adapters(model, ADAPTED[kind], size.rank)
        kind = "int8-dynamic"
    if kind.startswith("torchao "):
        _prepare_by_torchao(model, kind.removeprefix("torchao "))
    elif kind != "float":
        ModulesEngine().prepare(model, Recipe.load(RECIPES[kind]).match(model))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.words, (size.windows, size.tokens), generator=generator)

    def loss(forward: Any) -> Tensor:
        logits = forward(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return Step(model.train(), loss, compiled)


def image_step(kind: str, size: Size) -> Step:
    """A step of a ResNet for 32x32 images: ``float`` or ``int8-static``, whose observers look on."""
    torch.manual_seed(0)
    model = CifarResNet(size.depth)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size.images, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (size.images,), generator=generator)
    if kind != "float":
        engine = EagerEngine()
        plan = engine.lay_out(model, Recipe.load(kind).match(model), Example((images[:2],), {}))
        engine.prepare(model, plan)
        for observer in observers(model):
            observer.observing = True
    return Step(model.train(), lambda forward: F.cross_entropy(forward(images), labels))


def peak_bytes(kind: str, size: Size, steps: int = 3) -> int:
    """Memory that this process has needed for ``steps`` of a :func:`language_step` beyond what its libraries
    take, which a step of another size has loaded; Linux only."""
    torch.set_num_threads(1)
    language_step(kind, _TINY)()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = _status("VmRSS")
    step = language_step(kind, size)
    for _ in range(steps):
        step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    # Not getrusage: its peak is that of the parent where that was larger.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def _llama(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=size.words,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _with_adapters(model: nn.Module, layers: Sequence[str], rank: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=rank, target_modules=list(layers), task_type="CAUSAL_LM")
    adapted: nn.Module = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    return adapted


def _prepare_by_torchao(model: nn.Module, kind: str) -> None:
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    int4: Any = vars(torch)["int4"]  # not in the type stubs
    base: Any = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP))
    if kind == "int8-dynamic":
        base = Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerGroup(GROUP))
    embedding = QATConfig(weight_config=IntxFakeQuantizeConfig(int4, group_size=GROUP), step="prepare")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, QATConfig(base, step="prepare"))
        quantize_(model, embedding, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
