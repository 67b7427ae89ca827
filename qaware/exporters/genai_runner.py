"""A folder on ONNX Runtime GenAI, through its own Generator and key-value cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.base import first_line
from qaware.exporters.genai_files import SETTINGS
from qaware.exporters.generation import CachedRunner
from qaware.exporters.signature import Signature
from qaware.exporters.steps import require_given


def open_folder(path: Path, signature: Signature) -> CachedRunner:
    """Load a folder; it computes with as many threads as torch.

    Raises:
        QawareError: GenAI cannot load it.
    """
    generator = _Generator(path)
    return CachedRunner(generator.length, signature.longest, generator)


class _Generator:
    """A loaded folder and its cache."""

    def __init__(self, path: Path) -> None:
        self.name, self.held = path.name, 0
        try:
            import onnxruntime_genai as genai

            config = genai.Config(str(path))
            config.overlay(json.dumps(_threads()))
            self.model = genai.Model(config)
            # Its own default for the longest text is the ``max_length`` of the settings.
            self.generator = genai.Generator(self.model, genai.GeneratorParams(self.model))
            settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
            self.length = int(settings["search"]["max_length"])
        except Exception as error:
            raise QawareError(f"{self.name}: GenAI cannot load it: {first_line(error)}") from error

    def __call__(self, input_ids: Tensor, start: int) -> Tensor:
        """Logits float32 (1, S, V) of int64 ids (1, S) at ``start``.

        Raises:
            QawareError: the tokens before it were not given.
        """
        require_given(self.name, start, self.held)
        try:
            if start < self.held:
                self.generator.rewind_to(start)
            self.held = start
            self.generator.append_tokens(input_ids.detach().cpu().numpy().astype(np.int32))
            logits = torch.from_numpy(np.array(self.generator.get_output("logits")))
        except Exception as error:
            raise QawareError(f"{self.name}: GenAI cannot run it: {first_line(error)}") from error
        self.held = start + input_ids.shape[1]
        return logits


def _threads() -> dict[str, Any]:
    options = {"intra_op_num_threads": torch.get_num_threads(), "session.intra_op.allow_spinning": "0"}
    return {"model": {"decoder": {"session_options": options}}}
