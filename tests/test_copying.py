"""Copies of modules that users leave things on."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import qaware
from qaware import QawareError
from qaware.copying import deep_copy


def test_tensors_of_a_graph_are_copied_by_value() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.kept = [{"out": model(torch.ones(1, 4))}]
    duplicate = deep_copy(model)
    assert torch.equal(duplicate.kept[0]["out"], model.kept[0]["out"])
    assert model.kept[0]["out"].grad_fn is not None
    assert duplicate.kept[0]["out"].grad_fn is None


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].lock = threading.Lock()
    with pytest.raises(QawareError, match=r"^0\.lock: cannot be copied.*leave it out in __getstate__"):
        deep_copy(model)


def test_quantize_takes_a_module_that_has_run_pruned() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(torch.ones(1, 32)).sum().backward()
    quantized = qaware.quantize(model, "int8-weight-only")
    assert (quantized.weights["0"].data == 0).float().mean() >= 0.5
