"""What each step of quantizing costs on a model of a size, in seconds of the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qaware
from qaware.engines.base import QuantizedModel
from qaware.exporters import get_exporter
from qaware.lm import CausalLM
from qaware.metrics.windows import Windows
from qaware.pipeline import predictor
from qaware.rounding.recording import record
from qaware.tasks import LanguageTask, language_signature

TOKENS = 128
_GROUP = 32
EXPORTED = {"name": "growth int8", "rules": [{"name": "*", "scheme": {"bits": 8}}]}
"""A recipe that every runtime holds."""


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    hidden: int
    layers: int
    feedforward: int
    vocabulary: int
    windows: int
    """Of text, for calibration and for scoring."""
    exported: bool
    """Whether it is small enough to be exported within minutes."""


SHAPES = {
    "1 M": Shape(128, 4, 352, 1024, 8, True),
    "4 M": Shape(256, 4, 704, 2048, 8, True),
    "12 M": Shape(384, 6, 1024, 4096, 4, True),
    "30 M": Shape(512, 7, 1408, 8192, 4, False),
    "100 M": Shape(896, 9, 2432, 8192, 2, False),
}
TINY = {"tiny": Shape(64, 2, 96, 256, 2, False), "small": Shape(96, 3, 160, 512, 2, False)}


def language_model(shape: Shape) -> CausalLM:
    """With random weights, which cost what trained ones do."""
    torch.manual_seed(0)
    return CausalLM(
        {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "intermediate_size": shape.feedforward,
            "vocab_size": shape.vocabulary,
            "num_attention_heads": shape.hidden // 32,
            "num_key_value_heads": shape.hidden // 32,
            "max_position_embeddings": 2 * TOKENS,
            "tie_word_embeddings": False,
        }
    ).eval()


def texts(shape: Shape) -> list[Tensor]:
    """Windows of random tokens, int64 (1, TOKENS) each."""
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, shape.vocabulary, (1, TOKENS), generator=random) for _ in range(shape.windows)]


def recipe(rounding: Any) -> dict[str, Any]:
    """4 bits for linear layers, 8 for the embedding."""
    linear = {"type": "Linear", "scheme": {"bits": 4, "group_size": _GROUP}}
    return {
        "name": "growth",
        "rounding": rounding,
        "rules": [linear, {"role": "embedding", "scheme": {"bits": 8}}],
    }


def task_of(shape: Shape) -> LanguageTask:
    """Scores the windows of :func:`texts`."""
    windows = Windows.from_batches(texts(shape), "random tokens")
    return LanguageTask(windows, language_signature("ids", shape.vocabulary, TOKENS))


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Of this process and of those that it starts and waits for; and the result."""
    before = sum(os.times()[:4])
    result = function()
    return sum(os.times()[:4]) - before, result


def steps(shape: Shape, runtimes: tuple[str, ...], folder: Path) -> dict[str, float]:
    """CPU seconds by step: ``forward`` and ``scoring`` of one window, the others of the whole model."""
    model, data = language_model(shape), texts(shape)
    found: dict[str, float] = {}
    with torch.no_grad():
        model(data[0])
        found["forward"] = cpu_seconds(lambda: [model(ids) for ids in data])[0] / len(data)
    found["calibration"] = cpu_seconds(lambda: record(model, lambda look: _run(model, data)))[0]
    found["rtn"] = cpu_seconds(lambda: qaware.quantize(model, recipe("rtn")))[0]
    found["gptq"] = cpu_seconds(
        lambda: qaware.quantize(model, recipe("gptq"), calibration=data, calibration_batches=len(data))
    )[0]
    task = task_of(shape)
    predict = predictor(model, task)
    found["scoring"] = cpu_seconds(lambda: task.score(predict))[0] / len(data)
    for runtime in runtimes if shape.exported else ():
        found[runtime] = _exported(runtime, qaware.quantize(model, EXPORTED), task, folder)
    return found


def parameters(shape: Shape) -> int:
    """How many the model has."""
    return sum(p.numel() for p in language_model(shape).parameters())


def _run(model: CausalLM, data: list[Tensor]) -> None:
    for ids in data:
        model(ids)


def _exported(runtime: str, quantized: QuantizedModel, task: LanguageTask, folder: Path) -> float:
    exporter = get_exporter(runtime)
    path = folder / f"{runtime}{exporter.suffix}"
    return cpu_seconds(lambda: exporter.export(quantized, task.example, task.signature, path))[0]
