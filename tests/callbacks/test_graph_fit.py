"""The graph engine under a Trainer: for one runtime alone, trained and resumed like the others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_static import RECIPE, LitNet, data, lit, trainer
from torch import Tensor

import qaware
from qaware import PostTrainingQuantization, QuantizationAwareTraining
from qaware.callbacks.state import get_state
from qaware.engines.graph_module import Graphed


def qat(path: Path, runtime: str = "executorch", **options: Any) -> QuantizationAwareTraining:
    options = {"score": False, "convert": False, "target": "net", **options}
    return QuantizationAwareTraining(RECIPE, export=[runtime], output_dir=path / "q", **options)


@pytest.fixture(autouse=True)
def _runtime() -> None:
    pytest.importorskip("executorch")


@pytest.mark.parametrize("runtime", ["executorch", "aoti"])
def test_one_runtime_alone_gets_the_graph_engine(
    runtime: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = lit()
    with caplog.at_level("INFO"):
        trainer(tmp_path, qat(tmp_path, runtime)).fit(module, data(), data(1))
    assert isinstance(module.net, Graphed)
    assert any(line.startswith(f"qaware: engine graph ({runtime} alone") for line in caplog.messages)
    assert module.losses[-1] < module.losses[0]
    x = next(iter(data(1)))[0]
    with torch.no_grad():
        assert torch.equal(qaware.convert(module).module(x), module.eval()(x))


@pytest.mark.parametrize("stop", [5, 11])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, stop: int) -> None:
    options = {"freeze_batch_norm_step": 10, "freeze_observers_step": 9, "start_step": 2}
    whole = lit()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
    trainer(tmp_path, qat(tmp_path, **options), keep, enable_checkpointing=True).fit(whole, data(), data(1))
    second = lit(seed=1)
    trainer(tmp_path, qat(tmp_path, **options)).fit(
        second, data(), data(1), ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True
    )
    assert second.losses == whole.losses[stop:]
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in second.state_dict().items())
    loaded = qaware.load_from_checkpoint(LitNet, tmp_path / f"step={stop}.ckpt", weights_only=True)
    assert isinstance(loaded.net, Graphed)
    assert get_state(loaded) is not None


def test_batch_norms_freeze_at_a_step(tmp_path: Path) -> None:
    means: list[Tensor] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            means.append(pl_module.net.norm.running_mean.clone())

    trainer(tmp_path, qat(tmp_path, freeze_batch_norm_step=5), Look()).fit(lit(), data(6), data(1))
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(means)]
    assert moved == [True] * 4 + [False] * 7


class Choosy(LitNet):
    """Goes another way for large inputs, which no exported graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 2 if x.abs().max() > 1e6 else x)


def test_what_cannot_be_a_graph_goes_to_the_eager_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module = Choosy()
    with caplog.at_level("INFO"):
        trainer(tmp_path, qat(tmp_path, target=None)).fit(module, data(), data(1))
    assert any("engine eager (graph cannot take the model: " in line for line in caplog.messages)
    assert not isinstance(module, Graphed)


def test_ptq_ships_what_it_calibrated(tmp_path: Path) -> None:
    module = lit()
    trainer(tmp_path, max_epochs=4).fit(module, data())
    ptq = PostTrainingQuantization(
        RECIPE, target="net", export=["executorch"], output_dir=tmp_path / "q", calibration=data(4)
    )
    trainer(tmp_path, ptq).validate(module, data(4), verbose=False)
    assert ptq.result is not None
    assert ptq.result.parity["executorch"].steps is not None
    assert ptq.result.parity["executorch"].steps <= 1
    assert any("XNNPACK runs 3 of 3 layers in int8" in n for n in ptq.result.artifacts["executorch"].notes)
    top1 = ptq.result.scores["executorch"].top1
    assert top1 is not None
    assert top1 > 0.9
