"""The float models as ONNX files, which ONNX Runtime and OpenVINO start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import LM
from benchmarks.inputs import SIZES, Size, past_names
from benchmarks.peers.step import Step, empty, new_names
from benchmarks.speed_models import convolutions, language_model


def float_file(model: str, size: str, folder: Path) -> Path:
    """``<model>.onnx`` in a folder beside ``folder``, written once for both runtimes."""
    path = folder.parent / "onnx" / f"{model}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        program = _language(SIZES[size]) if model == LM else _convolutions(SIZES[size])
        program.save(str(path), external_data=False)
    return path


def _language(size: Size) -> Any:
    tokens, past = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    given = empty(size, 3)
    return torch.onnx.export(
        Step(language_model(size)),
        (torch.zeros(1, 2, dtype=torch.int64), *given),
        dynamo=True,
        input_names=["input_ids", *past_names(size)],
        output_names=["logits", *new_names(size)],
        dynamic_shapes=({1: tokens}, tuple({2: past} for _ in given)),
        verbose=False,
    )


def _convolutions(size: Size) -> Any:
    image = torch.zeros(1, 3, size.image, size.image)
    return torch.onnx.export(
        convolutions(size),
        (image,),
        dynamo=True,
        input_names=["image"],
        output_names=["scores"],
        verbose=False,
    )
