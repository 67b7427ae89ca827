"""Labelled images for training and scoring: read once, kept in memory, normalized."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from qaware.errors import QawareError
from qaware.resumable import Shuffled
from qaware.vision import batches
from qaware.vision.images import Array, Images, stack
from qaware.vision.sources import read_parts


class _Part(NamedTuple):
    pixels: Array
    """uint8 (N, C, H, W)."""
    labels: Array
    """int64 (N,)."""


class ImageDataModule(pl.LightningDataModule):
    """Batches ``(images, labels)``, float32 (B, C, H, W) and int64 (B,), from local files or the hub.

    Args:
        source: ``"sklearn-digits"``; a ``.npz`` file (``x_train``, ``y_train``, perhaps ``x_test``,
            ``y_test``; or ``jpeg``, ``offset``, ``label``); a ``.parquet`` file; a folder with a folder of
            images for each class (perhaps below ``train`` and ``test``), or of a dataset; or the name of a
            dataset on the hub.
        val_source: images to validate and score on. Without one it is the split that ``source`` keeps apart
            (``validation`` or ``test``), else ``val_fraction`` of each class, the same ones in every run.
        config, split, val_split: which parts of a dataset.
        image_field, label_field: columns of a dataset; found where there is one of the kind.
        size: (height, width) to scale all images to; None where they have one size.
        channels: 1 or 3; None for 3 where any training image has colour.
        classes: number of classes; None for as many as the training data names or numbers.
        mean, std: of each channel, as shares of 255; None for those of the training images.
        batch_size: images of a batch.
        crop_padding: cut training images out of a black border of so many pixels, at a random place.
        flip: mirror half of the training images.
        max_images: read at most so many images of each part, the first ones of a fixed random order.
        seed: of the order of training images and of their changes; both depend on the epoch too, so a
            resumed run repeats them.
        num_workers: processes that make batches; 0 for none.

    Raises:
        QawareError: an option is out of range; later, a source cannot be used.
    """

    def __init__(
        self,
        source: str,
        val_source: str | None = None,
        val_fraction: float = 0.2,
        config: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        image_field: str | None = None,
        label_field: str | None = None,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        classes: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch_size: int = 64,
        crop_padding: int = 0,
        flip: bool = False,
        max_images: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        # Not to the logger, where names such as `seed` would clash with those of the model.
        self.save_hyperparameters(logger=False)
        _check(self.hparams)
        self.batch_size = batch_size

    def setup(self, stage: str | None = None) -> None:
        """Read the images, once.

        Raises:
            QawareError: a source, or what is in it, cannot be used.
        """
        train, val = (part.pixels.shape[2:] for part in (self._train, self._val))
        if train != val:
            raise QawareError(
                f"size: training images have {train[0]}x{train[1]} pixels and validation images "
                f"{val[0]}x{val[1]}; give size, e.g. [{train[0]}, {train[1]}]"
            )

    @property
    def channels(self) -> int:
        """1 or 3."""
        return int(self._train.pixels.shape[1])

    @property
    def classes(self) -> int:
        """Number of classes; labels are 0 to one less."""
        images = self._images[0]
        counted = len(images.names) if images.names else int(images.labels.max()) + 1
        return int(self.hparams["classes"] or max(counted, 2))

    def preprocessing(self) -> dict[str, Any]:
        """How pixels become inputs, as plain data: ``mean`` and ``std`` of each channel as shares of 255,
        ``channels``, ``size`` (height, width) and ``classes``. An artifact keeps it."""
        mean, std = self._statistics
        return {
            "mean": list(mean),
            "std": list(std),
            "channels": self.channels,
            "size": list(self._train.pixels.shape[2:]),
            "classes": self.classes,
        }

    @functools.cached_property
    def _images(self) -> tuple[Images, Images]:
        h: Any = self.hparams
        return read_parts(
            h.source,
            h.val_source,
            h.val_fraction,
            config=h.config,
            columns=(h.image_field, h.label_field),
            splits=(h.split, h.val_split),
            limit=h.max_images,
        )

    @functools.cached_property
    def _train(self) -> _Part:
        return self._stack(self._images[0], "source")

    @functools.cached_property
    def _val(self) -> _Part:
        return self._stack(self._images[1], "val_source" if self.hparams["val_source"] else "source")

    def _stack(self, images: Images, key: str) -> _Part:
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= self.classes:
            raise QawareError(
                f"classes: {key} has label {low if low < 0 else high}, and {self.classes} classes are 0 to "
                f"{self.classes - 1}; set classes, or choose a part of the data that has labels"
            )
        size = self.hparams["size"]
        coloured = any(image.ndim == 3 for image in self._images[0].pixels)
        channels = self.hparams["channels"] or (3 if coloured else 1)
        return _Part(stack(images.pixels, channels, tuple(size) if size else None, key), images.labels)

    @functools.cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, given or those of the training images."""
        given: dict[str, Any] = {key: self.hparams[key] for key in ("mean", "std")}
        for key, measured in zip(("mean", "std"), batches.statistics(self._train.pixels), strict=True):
            values = given[key] = tuple(map(float, measured if given[key] is None else given[key]))
            if len(values) != self.channels or (key == "std" and min(values) <= 0):
                raise QawareError(
                    f"{key}: {list(values)} must be {self.channels} numbers, one a channel"
                    + (", above 0; give std" if key == "std" else "")
                )
        return given["mean"], given["std"]

    def _normalized(self, part: _Part) -> batches.Normalized:
        mean, std = (torch.tensor(values) for values in self._statistics)
        return batches.Normalized(part.pixels, part.labels, mean, std)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and, where that is asked for, augmented batches; can be resumed within an epoch."""
        h: Any = self.hparams
        images = self._normalized(self._train)
        if h.crop_padding or h.flip:
            images = batches.Augmented(images, h.crop_padding, h.flip, h.seed)
        return batches.ImageLoader(
            images,
            batch_size=self.batch_size,
            sampler=Shuffled(images, h.seed),
            num_workers=h.num_workers,
        )

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Training images as they are, in the random order of the first epoch."""
        images = self._normalized(self._train)
        return DataLoader(
            images,
            batch_size=self.batch_size,
            sampler=Shuffled(images, self.hparams["seed"]),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images, in their order."""
        return DataLoader(
            self._normalized(self._val),
            batch_size=self.batch_size,
            num_workers=self.hparams["num_workers"],
        )

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def _check(options: Any) -> None:
    legal = {
        "val_fraction": (0 < options["val_fraction"] < 1, "between 0 and 1"),
        "batch_size": (options["batch_size"] >= 1, "at least 1"),
        "crop_padding": (options["crop_padding"] >= 0, "0 or more"),
        "channels": (options["channels"] in (None, 1, 3), "1, 3 or null"),
        "classes": (options["classes"] is None or options["classes"] >= 2, "2 or more, or null"),
        "max_images": (options["max_images"] is None or options["max_images"] >= 2, "2 or more, or null"),
        "size": (options["size"] is None or min(options["size"]) >= 1, "(height, width), or null"),
        "seed": (options["seed"] >= 0, "0 or more"),
    }
    for key, (fits, what) in legal.items():
        if not fits:
            raise QawareError(f"{key}: {options[key]!r} must be {what}")
