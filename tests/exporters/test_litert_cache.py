"""Language models on LiteRT with a key-value cache: whole texts, steps and generation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qaware.errors import QawareError
from qaware.exporters import get_exporter, litert_cache
from qaware.exporters.litert_flatbuffer import Flatbuffer

sys.path.insert(0, str(Path(__file__).parents[1]))
import generating_lm as lm

EXPORTER = get_exporter("litert")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)


@pytest.mark.parametrize(("recipe", "grouped"), [("int4-weight-only", True), ("int8-dynamic", False)])
def test_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, grouped: bool) -> None:
    if not grouped:  # as a model whose attention is no plain one
        monkeypatch.setattr(litert_cache, "attends", lambda module: False)
    quantized = lm.quantized(recipe, "litert")
    artifact = lm.export(EXPORTER, quantized, tmp_path)
    lm.require_generation(EXPORTER, quantized, artifact)
    runner: Any = EXPORTER.open(artifact.path, lm.SIGNATURE)
    runner(lm.text(3))
    with pytest.raises(QawareError, match="step at 9, but only 3 tokens were given"):
        runner.step(lm.text(1), 9)
    _requires_the_end_of_the_cache(runner)
    file = Flatbuffer(artifact.path.read_bytes())
    _requires_weights_once(file)
    found = {file.operator(op) for graph in file.model.subgraphs for op in graph.operators}
    assert ("BROADCAST_TO" in found) is not grouped, "keys are repeated for each head"


def _requires_the_end_of_the_cache(runner: Any) -> None:
    """Several tokens at once where padding would reach beyond it."""
    ids = lm.text(lm.CONTEXT, 4)

    def steps(count: int) -> torch.Tensor:
        starts = range(0, lm.CONTEXT, count)
        return torch.cat([runner.step(ids[:, i : i + count], i) for i in starts], 1)

    # An int8 activation near an edge rounds as the size of the product has it.
    assert (steps(7) - steps(lm.LONGEST)).abs().mean() < 0.01 * steps(7).std()


def _requires_weights_once(file: Flatbuffer) -> None:
    tensors = [t for g in file.model.subgraphs for t in g.tensors if t.name and t.name.endswith(b".weight")]
    names = {t.name for t in tensors}
    assert len(tensors) == 2 * len(names)
    assert len({t.buffer for t in tensors}) == len(names)
    assert [s.signatureKey for s in file.model.signatureDefs] == [b"prefill", b"decode"]
