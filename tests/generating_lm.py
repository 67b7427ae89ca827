"""A tiny CausalLM that generates something, and what every runtime's test asks of its artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qaware
from qaware.engines.base import QuantizedModel
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Exporter
from qaware.exporters.decode import in_steps
from qaware.exporters.isolated import IsolatedRunner
from qaware.lm import CausalLM
from qaware.parity import compare
from qaware.tasks import language_signature

VOCABULARY, LONGEST, CONTEXT = 96, 16, 48
SIGNATURE = language_signature("input_ids", VOCABULARY, LONGEST)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
}


def quantized(recipe: str | dict[str, Any], runtime: str, seed: int = 0) -> QuantizedModel:
    torch.manual_seed(seed)
    return qaware.quantize(CausalLM(CONFIG).eval(), recipe, runtimes=[runtime])


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def export(exporter: Exporter, model: QuantizedModel, folder: Path) -> Artifact:
    return exporter.export(model, (text(LONGEST),), SIGNATURE, folder / f"lm{exporter.suffix}")


def require_generation(exporter: Exporter, model: QuantizedModel, artifact: Artifact) -> None:
    """Whole texts, steps and greedy tokens are those of the model; a cache forgets other texts."""
    reference = SIGNATURE.wrap(exporter.reference(model)).eval()
    tolerance = exporter.tolerance_for(model.plan)
    with IsolatedRunner(artifact) as runner, torch.no_grad():
        assert (runner.length, runner.most) == (CONTEXT, LONGEST)
        wholes = [(text(LONGEST),), (text(3, 1),), (text(1, 2),)]
        compare(runner, reference, wholes, []).require(artifact.path.name, tolerance)
        runner(text(LONGEST, 9))
        compare(in_steps(runner, 5), reference, wholes[:2], []).require("steps", tolerance)
        prompt = text(LONGEST + 4, 3)
        found = runner.generate(prompt, 20)
        assert torch.equal(runner.generate(prompt, 20), found)
        agree = [greedy(exporter.reference(model), found[:, :n]) == int(found[0, n]) for n in range(20, 40)]
        # int8 activations near an edge may choose another of two equally likely tokens.
        assert sum(agree) >= (20 if tolerance.relative < 1e-3 else 18)


def greedy(module: Any, ids: Tensor) -> int:
    return int(module(ids)[0, -1].argmax())
