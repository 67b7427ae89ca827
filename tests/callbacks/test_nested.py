"""Copies of a module, and validation outside the Trainer's loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lit import LitLM, loader, trainer
from torch.nn.utils import prune

from qaware.callbacks.hooks import override
from qaware.callbacks.nested import detached_copy, validate


def test_a_copy_knows_no_trainer_and_no_override() -> None:
    model = LitLM()
    run = trainer(max_epochs=1)
    run.fit(model, loader())
    override(model, "configure_model", lambda module, original: original())
    duplicate = detached_copy(model)
    assert duplicate._trainer is None
    assert "configure_model" not in vars(duplicate)
    assert not duplicate.training
    assert model._trainer is run
    assert "configure_model" in vars(model)


def test_tensors_that_hang_in_a_graph_are_copied_by_value() -> None:
    model = LitLM()
    model.last = model.loss(next(iter(loader())))
    model.kept = [{"loss": model.last * 2}]
    duplicate = detached_copy(model)
    assert duplicate.last.item() == model.last.item()
    assert duplicate.kept[0]["loss"].item() == 2 * model.last.item()
    assert model.last.grad_fn is not None
    assert duplicate.last.grad_fn is None


def test_a_pruned_module_can_be_copied() -> None:
    model = LitLM()
    prune.l1_unstructured(model.body.up, "weight", 0.5)
    model.loss(next(iter(loader()))).backward()
    duplicate = detached_copy(model)
    assert (duplicate.body.up.weight == 0).float().mean() == 0.5


def test_validate_gives_the_users_metrics_in_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LitLM()
    expected = trainer().validate(model, loader(9), verbose=False)[0]
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    rank: Any = getattr(rank_zero_only, "rank", None)
    assert validate(detached_copy(model), loader(9), 1.0) == expected
    assert getattr(rank_zero_only, "rank", None) == rank
    assert validate(detached_copy(model), loader(9), 1) != expected


def test_a_copy_can_still_be_trained_after_validate() -> None:
    duplicate = detached_copy(LitLM())
    validate(duplicate, loader(9), 1)
    duplicate.train()
    duplicate.loss(next(iter(loader()))).backward()
    assert torch.isfinite(duplicate.body.up.weight.grad).all()


def test_the_copy_of_a_compiled_module_computes_by_itself() -> None:
    class Steps(LitLM):
        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            return self.loss(batch)  # self.log cannot be compiled

    model = Steps()
    run = trainer(max_epochs=1)
    run.fit(torch.compile(model, backend="eager"), loader())
    duplicate = detached_copy(model)
    with torch.no_grad():
        duplicate.body.head.weight.zero_()
    batch = next(iter(loader()))
    assert duplicate.validation_step(batch, 0).item() == pytest.approx(math.log(64))
    assert model.validation_step(batch, 0).item() < math.log(64) - 0.1
