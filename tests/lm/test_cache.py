"""Folders of tokens: what is written is read back, and nobody ever sees half of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qaware.lm.cache import Stream, digest, publish


def test_documents_are_joined_saved_and_mapped(tmp_path: Path) -> None:
    documents = [(np.array([1, 2, 3], np.int32), np.array([4, 5, 6], np.int32)), (np.zeros(0, np.int32),) * 2]
    Stream.join([*documents, *documents]).save(tmp_path / "new" / "train")
    found = Stream.open(tmp_path / "new" / "train")
    assert found.ids.tolist() == [1, 2, 3, 1, 2, 3]
    assert found.bytes.tolist() == [4, 5, 6, 4, 5, 6]
    assert found.ends.tolist() == [3, 3, 6, 6]
    assert [array.dtype for array in found] == [np.int32, np.int32, np.int64]
    assert all(isinstance(array, np.memmap) for array in found)


def test_digests_ignore_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": None}) == digest({"b": None, "a": 1}) != digest({"a": 1, "b": 0})


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "text" / "abc"

    def build(new: Path) -> None:
        new.mkdir()
        (new / "one").touch()
        assert not folder.exists()

    publish(build, folder)
    assert [file.name for file in folder.iterdir()] == ["one"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(new: Path) -> None:
        new.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(build, tmp_path / "text" / "abc")
    assert list((tmp_path / "text").iterdir()) == []


def test_the_first_of_two_that_race_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "text" / "abc"

    def first(new: Path) -> None:
        new.mkdir()
        (new / "first").touch()

    def second(new: Path) -> None:
        new.mkdir()
        publish(first, folder)  # the other one is done before this one can rename

    publish(second, folder)
    assert [file.name for file in folder.iterdir()] == ["first"]
    assert list(folder.parent.iterdir()) == [folder]


def test_two_that_race_agree(make: Any) -> None:
    first, second = make(), make()
    build = second._build

    def late(folder: Path) -> None:
        build(folder)
        first.prepare_data()  # the other one is done before this one can rename

    second._build = late
    second.prepare_data()
    assert second.windows().protocol() == first.windows().protocol()
    assert list(first.folder.parent.iterdir()) == [first.folder]


def test_a_name_that_cannot_be_taken_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("a file")
    with pytest.raises(OSError, match="abc"):
        publish(Path.mkdir, tmp_path / "abc")
