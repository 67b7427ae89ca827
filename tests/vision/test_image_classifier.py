"""The classifier learns, logs, is restored without its files, and refuses what cannot work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from qaware.errors import QawareError
from qaware.vision import ImageClassifier, ImageDataModule

SMALL = {"name": "small-cnn", "classes": 3, "channels": 1, "width": 4}


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(accelerator="cpu", enable_checkpointing=False, **(quiet | {"max_epochs": 6} | options))


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adamw", 0.03)])
def test_it_learns(jpeg_npz: Path, optimizer: str, lr: float) -> None:
    pl.seed_everything(0, verbose=False)
    data = ImageDataModule(str(jpeg_npz), batch_size=6)
    model = ImageClassifier(SMALL, lr=lr, optimizer=optimizer)
    fit = trainer(max_epochs=12)
    fit.fit(model, datamodule=data)
    assert fit.callback_metrics["val_accuracy"] == 1
    assert {"train_loss", "train_accuracy", "val_loss"} <= fit.callback_metrics.keys()
    tested = fit.test(model, datamodule=data, verbose=False)[0]
    assert tested["test_accuracy"] == 1
    predicted = torch.cat(fit.predict(model, datamodule=data))  # type: ignore[arg-type]
    assert sorted(predicted.tolist()) == sorted(int(y) for _, ys in data.val_dataloader() for y in ys)


def test_accuracy_is_a_mean_over_images(jpeg_npz: Path) -> None:
    """Batches of 5 and 1."""
    data = ImageDataModule(str(jpeg_npz), batch_size=5, val_fraction=0.25)
    model = ImageClassifier(SMALL).eval()
    done = trainer().validate(model, datamodule=data, verbose=False)[0]
    logits = torch.cat([model(images) for images, _ in data.val_dataloader()])
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert done["val_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert done["val_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def rates(steps: int, **options: Any) -> list[float]:
    model = ImageClassifier(SMALL, lr=1.0, **options)
    model.trainer = trainer(max_steps=steps, max_epochs=-1)
    model.trainer.fit_loop._data_source.instance = [0]
    scheduled = model.configure_optimizers()
    found = []
    for _ in range(steps):
        found.append(scheduled["optimizer"].param_groups[0]["lr"])
        scheduled["optimizer"].step()
        scheduled["lr_scheduler"]["scheduler"].step()
    return found


def test_schedules() -> None:
    cosine = rates(8)
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    assert rates(8, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_biases_and_norms_are_not_decayed() -> None:
    model = ImageClassifier(SMALL, schedule="constant", weight_decay=0.1)
    decayed, free = model.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_a_checkpoint_needs_neither_the_first_file_nor_code(tmp_path: Path) -> None:
    first = ImageClassifier(SMALL)
    torch.save(first.network.state_dict(), tmp_path / "w.pt")
    model = ImageClassifier(SMALL, checkpoint=str(tmp_path / "w.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True))
    fit = trainer()
    fit.strategy.connect(model)
    fit.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    (tmp_path / "w.pt").unlink()
    again = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert again.hparams["network"] == SMALL
    assert torch.equal(again(torch.ones(1, 1, 8, 8)), again(torch.ones(1, 1, 8, 8)))
    ImageClassifier(SMALL, checkpoint=str(tmp_path / "model.ckpt"))


def test_a_module_of_the_user(jpeg_npz: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    model = ImageClassifier(network)
    trainer(max_epochs=1).fit(model, datamodule=ImageDataModule(str(jpeg_npz)))
    assert "network" not in model.hparams
    assert model(torch.zeros(2, 1, 6, 6)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "resnet"}, "network.name: 'resnet'"),
        ({"optimizer": "lion"}, "optimizer: 'lion' is not one of sgd, adamw"),
        ({"schedule": "step"}, "schedule: 'step' is not one of cosine, constant"),
        ({"checkpoint": "missing.pt"}, "missing.pt cannot be read"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QawareError, match=message):
        ImageClassifier(**options)


def test_a_cosine_needs_an_end(jpeg_npz: Path) -> None:
    endless = trainer(max_epochs=-1, max_time="00:00:00:30")
    with pytest.raises(QawareError, match="schedule: 'cosine' needs a last step; set max_steps"):
        endless.fit(ImageClassifier(SMALL), datamodule=ImageDataModule(str(jpeg_npz)))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            SMALL | {"channels": 3},
            "channels: the images have 1 and the network 3; set the network's channels",
        ),
        (SMALL | {"classes": 2}, "classes: the images have 3 and the network 2"),
    ],
)
def test_images_that_do_not_fit(jpeg_npz: Path, network: dict[str, Any], message: str) -> None:
    with pytest.raises(QawareError, match=message):
        trainer().validate(ImageClassifier(network), datamodule=ImageDataModule(str(jpeg_npz)))


def test_more_classes_than_the_images_have_are_fine(jpeg_npz: Path) -> None:
    model = ImageClassifier(SMALL | {"classes": 10})
    trainer().validate(model, datamodule=ImageDataModule(str(jpeg_npz)), verbose=False)
