"""From a module to the bytes of a ``.tflite`` file with floats, by litert-torch."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qaware.exporters.base import in_evaluation
from qaware.exporters.litert_marks import Mark, mark_graph, weight_is_static

_SETTINGS = {
    "LITERT_TORCH_SHOW_PROGRESS": "n",
    # It would take the handlers of torch's loggers away, in the whole process.
    "LITERT_TORCH_SILENCE_TORCH_LOGS": "n",
    # Of the native libraries that it loads: warnings and errors only, and none about oneDNN.
    "TF_CPP_MIN_LOG_LEVEL": "1",
    "TF_ENABLE_ONEDNN_OPTS": "0",
}
_NARROWED = "downcasts 64-bit model I/O to 32-bit"
"""Of a line that litert-torch logs for token ids, which the runner narrows itself."""


def convert(signatures: Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]], marks: list[Mark]) -> bytes:
    """A file with one function for each signature, of the shapes of its example, and marks as weights."""
    converter: Any = None
    with _quietly(), torch.no_grad():
        import litert_torch

        for name, (module, example) in signatures.items():
            module = _traced(in_evaluation(module.requires_grad_(False).cpu()), example, marks)
            start = litert_torch if converter is None else converter
            converter = start.signature(name, module, example)
        content: bytes = converter.convert().model_content()
    return content


def _traced(module: nn.Module, example: tuple[Tensor, ...], marks: list[Mark]) -> nn.Module:
    """``module``, or if it rounds activations to int8 its graph with one pair of operators at each grid."""
    if not any(weight_is_static(mark) for mark in marks):
        return module
    # Late: it registers operators, which plans without static activations have no use for.
    from qaware.exporters.qdq import clean

    program = torch.export.export(module, example, strict=False)
    clean(program.graph_module, torch.int8, whole=True)
    graph = program.module()
    mark_graph(graph, marks)
    return in_evaluation(graph)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress of litert-torch, which is set in the environment, and that line."""
    before = {key: os.environ.get(key) for key in _SETTINGS}
    root = logging.getLogger()
    os.environ.update(_SETTINGS)
    root.addFilter(_unless_narrowed)
    try:
        yield
    finally:
        root.removeFilter(_unless_narrowed)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _unless_narrowed(record: logging.LogRecord) -> bool:
    return _NARROWED not in record.getMessage()
