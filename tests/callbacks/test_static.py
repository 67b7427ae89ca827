"""Integer activations under a Trainer: the eager engine, through both callbacks."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from resumable_loader import Resumable
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import qaware
from qaware import PostTrainingQuantization, QawareError, QuantizationAwareTraining
from qaware.engines.static_integer import IntegerLayer
from qaware.engines.static_layers import FakeQuantizedLayer
from qaware.observers import observers

RECIPE = {"name": "static", "rules": [{"name": "*", "scheme": {"bits": 8, "activation": "int8-static"}}]}


class Net(nn.Module):
    """A residual block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(self.conv(x)) + x)
        return self.head(x.mean((2, 3)))


class LitNet(pl.LightningModule):
    """``losses`` has one entry a training batch."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.net: Any = None if lazy else Net()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def data(count: int = 8, size: int = 16) -> Resumable:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * size, 3, 8, 8, generator=generator)
    y = (x.mean((1, 2, 3)) * 12 + 2).long().clamp(0, 3)
    return Resumable(TensorDataset(x, y), size)


def lit(seed: int = 0, **options: Any) -> LitNet:
    torch.manual_seed(seed)
    return LitNet(**options)


def trainer(path: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {**quiet, "enable_checkpointing": False, "max_epochs": 2}
    return pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks), default_root_dir=path)


def qat(path: Path, **options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(RECIPE, output_dir=path / "q", **options)


def test_qat_trains_scores_and_converts_what_it_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    module, callback = lit(), qat(tmp_path)
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback, max_epochs=6).fit(module, data(), data(4))
    assert "qaware: engine eager (integers)" in caplog.messages
    summary = next(line for line in caplog.messages if line.startswith("static: 3 layers"))
    assert "BatchNorm2d" not in summary  # folded, not left in float
    result = callback.result
    assert result is not None
    assert result.scores["prepared"].nats == result.scores["converted"].nats
    assert isinstance(result.model.module.net.conv, IntegerLayer)
    assert isinstance(module.net.conv, FakeQuantizedLayer)
    x = next(iter(data(1)))[0]
    with torch.no_grad():
        assert torch.equal(module.eval()(x), result.model.module(x))


def test_ptq_leaves_the_model_alone_and_is_close(tmp_path: Path) -> None:
    module = lit()
    trainer(tmp_path, max_epochs=4).fit(module, data())
    before = copy.deepcopy(module.state_dict())
    ptq = PostTrainingQuantization(RECIPE, output_dir=tmp_path / "q", calibration=data(4))
    trainer(tmp_path, ptq).validate(module, data(4), verbose=False)
    assert ptq.result is not None
    score = ptq.result.scores["converted"]
    assert score.top1 is not None
    assert score.top1 > 0.95
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_batch_norms_move_until_they_are_frozen_at_a_step(tmp_path: Path) -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.means: list[Tensor] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self.means.append(pl_module.net.norm.running_mean.clone())

    look, module = Look(), lit()
    callback = qat(tmp_path, freeze_batch_norm_step=5, freeze_observers_step=7, score=False, convert=False)
    trainer(tmp_path, callback, look, max_epochs=2).fit(module, data(6), data(1))
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(look.means)]
    assert moved == [True] * 4 + [False] * 7
    with pytest.raises(QawareError, match="freeze_batch_norm_step: 0 must be at least 1, or None"):
        qat(tmp_path, freeze_batch_norm_step=0)


@pytest.mark.parametrize("stop", [5, 8, 11])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, stop: int) -> None:
    """In mid-epoch, on the last batch of an epoch, and with batch norms frozen."""
    options = {"freeze_batch_norm_step": 10, "freeze_observers_step": 9, "score": False, "convert": False}
    whole = lit()
    trainer(tmp_path, qat(tmp_path, **options)).fit(whole, data(), data(1))
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
    first = lit()
    trainer(tmp_path, qat(tmp_path, **options), keep, enable_checkpointing=True).fit(first, data(), data(1))
    assert first.losses == whole.losses
    second = lit(seed=1)
    trainer(tmp_path, qat(tmp_path, **options)).fit(
        second, data(), data(1), ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True
    )
    assert second.losses == whole.losses[stop:]
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in second.state_dict().items())


def test_a_checkpoint_says_where_activations_are_rounded(tmp_path: Path) -> None:
    module = lit()
    keep = ModelCheckpoint(tmp_path, "last", save_weights_only=True)
    trainer(tmp_path, qat(tmp_path, score=False), keep, enable_checkpointing=True).fit(
        module, data(), data(1)
    )
    loaded = qaware.load_from_checkpoint(LitNet, tmp_path / "last.ckpt", weights_only=True)
    x = next(iter(data(1)))[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), module.eval()(x))
        assert torch.equal(qaware.convert(loaded).module(x), module(x))


def test_a_module_prepared_beforehand_is_trained_on(tmp_path: Path) -> None:
    module = lit()
    with pytest.raises(QawareError, match=r"need one batch, to see where the model rounds them; set"):
        qaware.prepare(module, RECIPE)
    module.example_input_array = torch.randn(2, 3, 8, 8)
    qaware.prepare(module, RECIPE)
    callback = qat(tmp_path)
    trainer(tmp_path, callback).fit(module, data(), data(1))
    assert callback.result is not None
    assert isinstance(callback.result.model.module.net.conv, IntegerLayer)


def test_layers_built_late_and_a_second_fit(tmp_path: Path) -> None:
    module, callback = lit(lazy=True), qat(tmp_path, score=False)
    trainer(tmp_path, callback).fit(module, data(), data(1))
    trainer(tmp_path, callback).fit(module, data(), data(1))
    assert isinstance(module.net.conv, FakeQuantizedLayer)
    assert callback.result is not None


def test_without_validation_the_training_data_shows_the_way(tmp_path: Path) -> None:
    module = lit()
    trainer(tmp_path, qat(tmp_path, score=False)).fit(module, data())
    assert isinstance(module.net.conv, FakeQuantizedLayer)


def test_a_target_is_laid_out_by_what_enters_it(tmp_path: Path) -> None:
    module, callback = lit(), qat(tmp_path, target="net")
    trainer(tmp_path, callback).fit(module, data(), data(1))
    assert callback.result is not None
    assert "stem.0" in callback.result.model.weights


def test_observers_see_training_batches_only(tmp_path: Path) -> None:
    class Loud(LitNet):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().validation_step([batch[0] * 1e4, batch[1]], batch_idx)

    torch.manual_seed(0)
    module = Loud()
    trainer(tmp_path, qat(tmp_path, score=False, convert=False)).fit(module, data(), data(2))
    assert max(float(o.max_val) for o in observers(module)) < 1e3


def test_synchronized_batch_norms_are_refused(tmp_path: Path) -> None:
    callback = qat(tmp_path, convert=False)
    run = trainer(tmp_path, callback)
    run._accelerator_connector._layer_sync = TorchSyncBatchNorm()
    with pytest.raises(QawareError, match=r"sync_batchnorm: net.stem.1 is folded into the layer before it"):
        run.fit(lit(), data(), data(1))


def test_another_engine_can_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(QawareError, match="engine: 'fx' is not one of auto, modules, eager, graph"):
        qat(tmp_path, engine="fx")
    with pytest.raises(QawareError, match=r"engine: 'modules' has no convolutions \(net.stem.0\)"):
        trainer(tmp_path, qat(tmp_path, engine="modules")).fit(lit(), data(), data(1))
    with pytest.raises(QawareError, match="engine: 'graph' quantizes for one of executorch, aoti"):
        trainer(tmp_path, qat(tmp_path, engine="graph")).fit(lit(), data(), data(1))
