"""Every source gives the same images; splits are the ones asked for, and the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from qaware.errors import QawareError
from qaware.vision.images import Images
from qaware.vision.sources import hold_out, read_parts

from .conftest import COUNT, NAMES, encoded, pixels


def read(source: Path | str, val_source: Path | str | None = None, **options: Any) -> tuple[Images, Images]:
    usual: dict[str, Any] = {"config": None, "columns": (None, None), "splits": ("train", None)}
    fraction = options.pop("val_fraction", 0.25)
    val = None if val_source is None else str(val_source)
    return read_parts(str(source), val, fraction, **(usual | options))


def table(names: bool = True) -> datasets.Dataset:
    """24 rows, not sorted by class."""
    order = np.random.default_rng(0).permutation(3 * COUNT)
    rows = {
        "image": [{"bytes": encoded(pixels(k // COUNT, k % COUNT)), "path": None} for k in order],
        "label": [int(k // COUNT) for k in order],
    }
    kind = datasets.ClassLabel(names=list(NAMES)) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), label=kind))


def check(images: Images) -> None:
    """Each image has the brightness of its class."""
    for image, label in zip(images.pixels, images.labels, strict=True):
        assert image.mean() == pytest.approx(54 + 80 * label, abs=8)


def test_an_image_folder(image_folder: Callable[..., Path]) -> None:
    train, val = read(image_folder())
    assert (len(train.labels), len(val.labels)) == (18, 6)
    assert train.names == NAMES
    check(train)
    check(val)


def test_an_image_folder_with_splits(image_folder: Callable[..., Path]) -> None:
    train, val = read(image_folder(splits=("train", "test")))
    assert (len(train.labels), len(val.labels)) == (24, 24)
    check(val)


def test_two_image_folders_are_matched_by_class_name(image_folder: Callable[..., Path]) -> None:
    val_folder = image_folder("val", names=NAMES[1:])
    train, val = read(image_folder(), val_folder)
    assert train.names == val.names == NAMES
    assert sorted(set(val.labels)) == [1, 2], "alone they would be 0 and 1"
    other = image_folder("other", names=("dark", "new"))
    with pytest.raises(QawareError, match="val_source: class 'new' is not in the training data"):
        read(val_folder.parent / "images", other)


@pytest.mark.parametrize("names", [True, False])
def test_parquet(tmp_path: Path, names: bool) -> None:
    table(names).to_parquet(tmp_path / "images.parquet")
    train, val = read(tmp_path / "images.parquet")
    assert (len(train.labels), len(val.labels)) == (18, 6)
    assert train.names == (NAMES if names else None)
    check(train)


def test_parquet_of_others(tmp_path: Path) -> None:
    """Plain bytes and class names, as pandas writes them."""
    rows = {"png": [encoded(pixels(k % 3, k)) for k in range(12)], "class": [NAMES[k % 3] for k in range(12)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "images.parquet")
    train, _ = read(tmp_path / "images.parquet", val_fraction=0.5)
    assert train.names == NAMES
    check(train)


def test_a_local_folder_in_place_of_a_hub_name(tmp_path: Path) -> None:
    """The layout of a dataset's repository on the hub."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table().to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    train, val = read(tmp_path)
    assert (len(train.labels), len(val.labels)) == (24, 24)
    check(val)


def test_saved_to_disk(tmp_path: Path) -> None:
    parts = {"train": table(), "extra": table().select(range(5)), "test": table()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    train, val = read(tmp_path / "both", splits=("train", "extra"))
    assert (len(train.labels), len(val.labels)) == (24, 5)
    with pytest.raises(QawareError, match=r"val_split: .* has no split 'tset', but train, extra, test"):
        read(tmp_path / "both", splits=("train", "tset"))
    table().save_to_disk(tmp_path / "one")
    check(read(tmp_path / "one")[0])


def test_the_columns_of_a_table(tmp_path: Path) -> None:
    rows = table().add_column("kind", list(range(24))).rename_column("label", "what")
    rows.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0].names == NAMES, "the only ClassLabel column"
    pictures = table().remove_columns("label").rename_column("image", "picture")
    two = datasets.concatenate_datasets([rows, pictures], axis=1)
    two.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(QawareError, match=r"image_field: None does not name .* image, what, kind, picture"):
        read(tmp_path / "b.parquet")
    read(tmp_path / "b.parquet", columns=("picture", "what"))
    for columns, message in (
        ((None, "labl"), "label_field: 'labl'"),
        (("imge", None), "image_field: 'imge'"),
    ):
        with pytest.raises(QawareError, match=message):
            read(tmp_path / "a.parquet", columns=columns)


def test_a_label_column_of_another_type(tmp_path: Path) -> None:
    table(names=False).cast_column("label", datasets.Value("float64")).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(QawareError, match="label_field: 'label' of source is float64, neither integers nor"):
        read(tmp_path / "a.parquet")


def test_no_images(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(QawareError, match=r"source: no images could be loaded from .*empty"):
        read(tmp_path / "empty")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.me").write_text("nothing")
    with pytest.raises(QawareError, match=r"source: no images could be loaded from .*notes"):
        read(tmp_path / "notes")
    broken = image_folder()
    (broken / "dark" / "3.png").write_bytes(b"no image")
    with pytest.raises(QawareError, match=r"source: image \d+ \(3.png\): is no image"):
        read(broken)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.npz", "source: 'missing.npz' does not exist"),
        ("./missing", "source: './missing' does not exist"),
        (__file__, "is no .npz or .parquet file"),
        ("nobody/no-such-images", "'nobody/no-such-images' .* could not be read from the hub"),
    ],
)
def test_no_source(source: str, message: str) -> None:
    with pytest.raises(QawareError, match=message):
        read(source)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hub answers is read like a local table; the splits that nobody asked for are not."""
    loaded = datasets.DatasetDict(train=table(), test=table(), unlabelled=table().remove_columns("label"))
    asked = []

    def load(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, val = read("somebody/images", config="small")
    assert asked == [("somebody/images", "small")]
    check(train)
    assert len(val.labels) == 24


def test_each_class_gives_its_share() -> None:
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    images = Images([np.full((1, 1), i, dtype=np.uint8) for i in range(70)], labels)
    train, val = hold_out(images, 0.3)
    assert np.bincount(val.labels).tolist() == [12, 6, 3]
    ids = [int(image[0, 0]) for image in (*train.pixels, *val.pixels)]
    assert sorted(ids) == list(range(70))
    assert [int(i[0, 0]) for i in hold_out(images, 0.3)[1].pixels] == ids[len(train.labels) :], "again"
    assert ids[len(train.labels) :][:12] != list(range(28, 40)), "not simply the last ones"
    with pytest.raises(QawareError, match=r"val_fraction: 0.01 of 70 images holds out 0"):
        hold_out(images, 0.01)


def test_a_limit_takes_some_of_each_class(jpeg_npz: Path) -> None:
    train, val = read(jpeg_npz, val_fraction=0.5, limit=9)
    assert (len(train.labels), len(val.labels)) == (9, 9)
    assert set(train.labels) == {0, 1, 2}
    check(train)
