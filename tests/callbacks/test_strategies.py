"""Strategies that are refused before training; the acceptance cases train with those that work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lit import LitLM, trainer

import qaware
from qaware import PostTrainingQuantization, QawareError, QuantizationAwareTraining
from qaware.callbacks.strategies import refuse_flat, require_prepared


def with_strategy(strategy: Any) -> Any:
    return SimpleNamespace(strategy=strategy, precision="32-true", callbacks=[])


def test_flat_weights_are_refused_with_the_strategy_to_use() -> None:
    run, module = with_strategy(FSDPStrategy()), LitLM()
    message = r"FSDPStrategy keeps weights .* use ModelParallelStrategy \(FSDP2\)"
    with pytest.raises(QawareError, match=message):
        QuantizationAwareTraining("int8-dynamic").setup(run, module, "fit")
    with pytest.raises(QawareError, match=message):
        PostTrainingQuantization("int8-dynamic").on_fit_start(run, module)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_other_processes_need_a_prepared_model(strategy: str) -> None:
    run = trainer(strategy=strategy, devices=2)
    with pytest.raises(QawareError, match=r"call qaware\.prepare\(model, recipe, target\) before trainer"):
        require_prepared(run, LitLM())
    require_prepared(run, qaware.prepare(LitLM(), "int8-dynamic"))


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy()])
def test_the_usual_ones_need_nothing(strategy: Any) -> None:
    refuse_flat(with_strategy(strategy))
    require_prepared(with_strategy(strategy), LitLM())
